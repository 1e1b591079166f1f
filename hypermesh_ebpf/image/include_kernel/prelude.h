/* What comes before everything else in the header tree for BCC programs: the types and words with
 * which BCC's own copy of bpf.h is written.  The kernel's types follow it. */
#pragma once

typedef signed char __s8;
typedef unsigned char __u8;
typedef short __s16;
typedef unsigned short __u16;
typedef int __s32;
typedef unsigned int __u32;
typedef long long __s64;
typedef unsigned long long __u64;
typedef __u16 __le16, __be16, __sum16;
typedef __u32 __le32, __be32, __wsum;
typedef __u64 __le64, __be64;
typedef __u64 __attribute__((aligned(8))) __aligned_u64;

#define CONFIG_BPF_SYSCALL 1
#define CONFIG_ARCH_HAS_SYSCALL_WRAPPER 1
#define NULL ((void *)0)

/* Marks for the kernel's own tools, of no meaning here. */
#define __user
#define __kernel
#define __iomem
#define __percpu
#define __rcu
#define __force
#define __bitwise
#define __nocast
#define __private
#define __safe
#define __must_hold(lock)
#define __acquires(lock)
#define __releases(lock)
#define __init
#define __exit
#define __initdata
#define __ro_after_init
#define __read_mostly
#define __sched
#define __cold
#define __must_check
#define __maybe_unused __attribute__((unused))
#define __always_unused __attribute__((unused))
#define __used __attribute__((used))
#define __packed __attribute__((packed))
#define __aligned(bytes) __attribute__((aligned(bytes)))
#define __attribute_const__ __attribute__((const))
#define __pure __attribute__((pure))
#define __weak __attribute__((weak))
#define __noreturn __attribute__((noreturn))
#define __printf(format, first) __attribute__((format(printf, format, first)))
#define noinline __attribute__((noinline))
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#define ____cacheline_aligned
#define ____cacheline_aligned_in_smp
#define ____cacheline_internodealigned_in_smp
#define asmlinkage
#define fallthrough __attribute__((fallthrough))
#define EXPORT_SYMBOL(symbol)
#define EXPORT_SYMBOL_GPL(symbol)
#define MODULE_LICENSE(license)

/* IS_ENABLED(CONFIG_X): 1 if it is "y" or "m", else 0, where a macro that is not defined stands for
 * itself: pasted to "1" it brings a comma that moves the answer into the second place. */
#define HM_FOUND_1 0,
#define HM_SECOND(first, second, ...) second
#define HM_ANSWER(found) HM_SECOND(found 1, 0, 0)
#define HM_PASTE(value) HM_ANSWER(HM_FOUND_##value)
#define HM_IS_ONE(value) HM_PASTE(value)
#define IS_BUILTIN(option) HM_IS_ONE(option)
#define IS_MODULE(option) HM_IS_ONE(option##_MODULE)
#define IS_ENABLED(option) (IS_BUILTIN(option) || IS_MODULE(option))
#define IS_REACHABLE(option) IS_BUILTIN(option)
