"""What tests share. A test file imports from here, and never from another test file."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REPO_ID = "kernels-community/fused-embedding-lookup"
