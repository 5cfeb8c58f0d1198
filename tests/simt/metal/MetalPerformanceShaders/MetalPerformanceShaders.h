#pragma once

#include <Metal/Metal.h>

@interface MPSCommandBuffer : NSObject {
  id encoder_;  // the last one made
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder;
- (void)commit;
@end
