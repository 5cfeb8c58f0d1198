#pragma once

#include <Metal/Metal.h>

@interface MPSCommandBuffer : NSObject {
 @public
  dispatch_queue_t queue_;
  id encoder_;  // the last one made
}
- (id<MTLComputeCommandEncoder>)computeCommandEncoder;
- (void)commit;
@end
