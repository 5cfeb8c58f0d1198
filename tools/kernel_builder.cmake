# For tools/kernel_builder.py: what find_package(Torch) does in a CUDA build of torch.
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CUDA_FOUND TRUE)
set(CUDA_VERSION ${CUDAToolkit_VERSION_MAJOR}.${CUDAToolkit_VERSION_MINOR})
set(CMAKE_CUDA_ARCHITECTURES OFF)
set(CMAKE_CUDA_FLAGS --expt-extended-lambda)
