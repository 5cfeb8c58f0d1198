"""What a shared library defines, and what it takes from elsewhere."""

import re

from helpers import process

# The C and C++ libraries; torch exports parts of the latter too, without a version.
SYSTEM = re.compile(r".*@(GLIBC|GLIBCXX|CXXABI|GCC)_|_Z(N[KRO]*)?St|_ITM_|__gmon_start__")


def undefined_symbols(extension):
    """The dynamic symbols that the extension takes from elsewhere, and all that it defines."""
    lines = process.run("nm", "--dynamic", extension).stdout.splitlines()
    undefined = [line.split()[-1] for line in lines if " U " in line or " w " in line]
    return undefined, [line.split()[-2:] for line in lines if " U " not in line]
