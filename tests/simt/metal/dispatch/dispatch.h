// The serial queues of Apple's Grand Central Dispatch.

#pragma once

typedef struct dispatch_queue_s* dispatch_queue_t;

void dispatch_sync(dispatch_queue_t queue, void (^block)());
