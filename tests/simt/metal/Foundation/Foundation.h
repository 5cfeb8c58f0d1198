// What csrc/metal/ uses of Apple's Foundation, on the GNU runtime for Objective-C.

#pragma once

#include <objc/objc.h>

#include <cstddef>
#include <cstdint>

typedef unsigned long NSUInteger;

__attribute__((objc_root_class))
@interface NSObject {
  Class isa;
  NSUInteger retain_count_;
}
+ (id)alloc;
- (id)init;
- (id)retain;
- (void)release;
- (id)autorelease;
- (void)checkAlive;
- (void)dealloc;
@end

@protocol NSObject
- (id)retain;
- (void)release;
@end

// Of @autoreleasepool.
@interface NSAutoreleasePool : NSObject
- (void)drain;
@end

@interface NSString : NSObject {
  void* string_;
}
+ (NSString*)stringWithUTF8String:(const char*)string;
- (const char*)UTF8String;
@end

@interface NSError : NSObject
- (NSString*)localizedDescription;
@end

@class NSDictionary;
