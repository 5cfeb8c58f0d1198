// In place of the header in which kernel-builder embeds the compiled shaders.

#pragma once

#include <Metal/Metal.h>

namespace simt_metal {
id<MTLLibrary> createLibrary(id<MTLDevice> device, NSError** error);
}
