// Named by PyTorch's MPSStream.h, and that is all.

#pragma once

@class MPSGraph, MPSGraphCompilationDescriptor, MPSGraphExecutionDescriptor;
typedef void* MTLCommandBufferHandler;
