/* Arguments of probed functions: registers by position, and programs written like functions.
 *
 * Which processor's registers are meant, __TARGET_ARCH_x86 or __TARGET_ARCH_arm64 tells; without
 * either it is guessed from the structure's source. */
#ifndef HMEBPF_BPF_TRACING_H
#define HMEBPF_BPF_TRACING_H

#include "bpf_helpers.h"

#if !defined(__TARGET_ARCH_x86) && !defined(__TARGET_ARCH_arm64)
#if defined(__x86_64__)
#define __TARGET_ARCH_x86
#elif defined(__aarch64__)
#define __TARGET_ARCH_arm64
#endif
#endif

/* -- registers: the calling convention of functions, and of system calls where it differs */

#if defined(__TARGET_ARCH_x86)
#define bpf_target_x86
#define bpf_target_defined
#define ___regs_t struct pt_regs
#define ___syscall_regs_t struct pt_regs
#if defined(__KERNEL__) || defined(__VMLINUX_H__)
#define ___arg1 di
#define ___arg2 si
#define ___arg3 dx
#define ___arg4 cx
#define ___arg5 r8
#define ___arg6 r9
#define ___returns ax
#define ___from_stack sp
#define ___frame bp
#define ___stack sp
#define ___instruction ip
#else /* asm/ptrace.h as user space has it */
#define ___arg1 rdi
#define ___arg2 rsi
#define ___arg3 rdx
#define ___arg4 rcx
#define ___arg5 r8
#define ___arg6 r9
#define ___returns rax
#define ___from_stack rsp
#define ___frame rbp
#define ___stack rsp
#define ___instruction rip
#endif
#define ___syscall_arg1 ___arg1
#define ___syscall_arg4 r10
#elif defined(__TARGET_ARCH_arm64)
#define bpf_target_arm64
#define bpf_target_defined
#define ___regs_t struct user_pt_regs /* the head of struct pt_regs, which never changes */
#define ___syscall_regs_t struct pt_regs
#define ___arg1 regs[0]
#define ___arg2 regs[1]
#define ___arg3 regs[2]
#define ___arg4 regs[3]
#define ___arg5 regs[4]
#define ___arg6 regs[5]
#define ___arg7 regs[6]
#define ___arg8 regs[7]
#define ___returns regs[0]
#define ___from_stack regs[30]
#define ___frame regs[29]
#define ___stack sp
#define ___instruction pc
#define ___syscall_arg1 orig_x0 /* x0 is overwritten by the result */
#define ___syscall_arg4 ___arg4
#endif

#ifdef bpf_target_defined

#define ___reg(regs, name) (((const ___regs_t *)(regs))->name)
#define ___reg_core(regs, name) BPF_CORE_READ((___regs_t *)(regs), name)
#define ___reg_syscall(regs, name) (((const ___syscall_regs_t *)(regs))->name)
#define ___reg_syscall_core(regs, name) BPF_CORE_READ((___syscall_regs_t *)(regs), name)

#define PT_REGS_PARM1(regs) ___reg(regs, ___arg1)
#define PT_REGS_PARM2(regs) ___reg(regs, ___arg2)
#define PT_REGS_PARM3(regs) ___reg(regs, ___arg3)
#define PT_REGS_PARM4(regs) ___reg(regs, ___arg4)
#define PT_REGS_PARM5(regs) ___reg(regs, ___arg5)
#define PT_REGS_PARM6(regs) ___reg(regs, ___arg6)
#ifdef ___arg7
#define PT_REGS_PARM7(regs) ___reg(regs, ___arg7)
#define PT_REGS_PARM8(regs) ___reg(regs, ___arg8)
#endif
#define PT_REGS_RET(regs) ___reg(regs, ___from_stack)
#define PT_REGS_FP(regs) ___reg(regs, ___frame)
#define PT_REGS_RC(regs) ___reg(regs, ___returns)
#define PT_REGS_SP(regs) ___reg(regs, ___stack)
#define PT_REGS_IP(regs) ___reg(regs, ___instruction)

/* From a program that may not look at the registers itself, such as a raw tracepoint. */
#define PT_REGS_PARM1_CORE(regs) ___reg_core(regs, ___arg1)
#define PT_REGS_PARM2_CORE(regs) ___reg_core(regs, ___arg2)
#define PT_REGS_PARM3_CORE(regs) ___reg_core(regs, ___arg3)
#define PT_REGS_PARM4_CORE(regs) ___reg_core(regs, ___arg4)
#define PT_REGS_PARM5_CORE(regs) ___reg_core(regs, ___arg5)
#define PT_REGS_PARM6_CORE(regs) ___reg_core(regs, ___arg6)
#define PT_REGS_RET_CORE(regs) ___reg_core(regs, ___from_stack)
#define PT_REGS_FP_CORE(regs) ___reg_core(regs, ___frame)
#define PT_REGS_RC_CORE(regs) ___reg_core(regs, ___returns)
#define PT_REGS_SP_CORE(regs) ___reg_core(regs, ___stack)
#define PT_REGS_IP_CORE(regs) ___reg_core(regs, ___instruction)

/* Of a system call: its registers are an argument of the function that a kprobe is on. */
#define PT_REGS_PARM1_SYSCALL(regs) ___reg_syscall(regs, ___syscall_arg1)
#define PT_REGS_PARM2_SYSCALL(regs) ___reg(regs, ___arg2)
#define PT_REGS_PARM3_SYSCALL(regs) ___reg(regs, ___arg3)
#define PT_REGS_PARM4_SYSCALL(regs) ___reg(regs, ___syscall_arg4)
#define PT_REGS_PARM5_SYSCALL(regs) ___reg(regs, ___arg5)
#define PT_REGS_PARM6_SYSCALL(regs) ___reg(regs, ___arg6)
#define PT_REGS_PARM1_CORE_SYSCALL(regs) ___reg_syscall_core(regs, ___syscall_arg1)
#define PT_REGS_PARM2_CORE_SYSCALL(regs) ___reg_core(regs, ___arg2)
#define PT_REGS_PARM3_CORE_SYSCALL(regs) ___reg_core(regs, ___arg3)
#define PT_REGS_PARM4_CORE_SYSCALL(regs) ___reg_core(regs, ___syscall_arg4)
#define PT_REGS_PARM5_CORE_SYSCALL(regs) ___reg_core(regs, ___arg5)
#define PT_REGS_PARM6_CORE_SYSCALL(regs) ___reg_core(regs, ___arg6)
#define PT_REGS_SYSCALL_REGS(ctx) ((struct pt_regs *)PT_REGS_PARM1(ctx))

/* The address that a function returns to; the caller's frame is not followed. */
#define BPF_KPROBE_READ_RET_IP(ip, ctx)                                                            \
    ({ bpf_probe_read_kernel(&(ip), sizeof(ip), (void *)PT_REGS_RET(ctx)); })
#define BPF_KRETPROBE_READ_RET_IP(ip, ctx)                                                         \
    ({ bpf_probe_read_kernel(&(ip), sizeof(ip), (void *)(PT_REGS_FP(ctx) + sizeof(ip))); })

#else

#define ___no_target _Pragma("GCC error \"define __TARGET_ARCH_x86 or __TARGET_ARCH_arm64 (-D)\"") 0
#define PT_REGS_PARM1(regs) (___no_target)
#define PT_REGS_PARM2(regs) (___no_target)
#define PT_REGS_PARM3(regs) (___no_target)
#define PT_REGS_PARM4(regs) (___no_target)
#define PT_REGS_PARM5(regs) (___no_target)
#define PT_REGS_PARM6(regs) (___no_target)
#define PT_REGS_PARM1_CORE(regs) (___no_target)
#define PT_REGS_PARM2_CORE(regs) (___no_target)
#define PT_REGS_PARM3_CORE(regs) (___no_target)
#define PT_REGS_PARM4_CORE(regs) (___no_target)
#define PT_REGS_PARM5_CORE(regs) (___no_target)
#define PT_REGS_PARM6_CORE(regs) (___no_target)
#define PT_REGS_PARM1_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM2_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM3_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM4_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM5_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM6_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM1_CORE_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM2_CORE_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM3_CORE_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM4_CORE_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM5_CORE_SYSCALL(regs) (___no_target)
#define PT_REGS_PARM6_CORE_SYSCALL(regs) (___no_target)
#define PT_REGS_RET(regs) (___no_target)
#define PT_REGS_FP(regs) (___no_target)
#define PT_REGS_RC(regs) (___no_target)
#define PT_REGS_SP(regs) (___no_target)
#define PT_REGS_IP(regs) (___no_target)
#define PT_REGS_RET_CORE(regs) (___no_target)
#define PT_REGS_FP_CORE(regs) (___no_target)
#define PT_REGS_RC_CORE(regs) (___no_target)
#define PT_REGS_SP_CORE(regs) (___no_target)
#define PT_REGS_IP_CORE(regs) (___no_target)
#define PT_REGS_SYSCALL_REGS(ctx) ((struct pt_regs *)(___no_target))

#endif

/* -- programs as functions.  What the section attaches is a function of the context alone; it calls
 * the one that is written, with the arguments taken out of the context.
 *
 *     SEC("fentry/do_unlinkat") int BPF_PROG(unlinked, int dfd, struct filename *name) {...}
 *     SEC("kprobe/do_unlinkat") int BPF_KPROBE(unlinked, int dfd, struct filename *name) {...}
 *     SEC("kretprobe/do_unlinkat") int BPF_KRETPROBE(done, long result) {...}
 *     SEC("ksyscall/unlinkat") int BPF_KSYSCALL(unlinked, int dfd, const char *path) {...}
 */

#define ___as_function(name, context, arguments, ...)                                              \
    name(context);                                                                                 \
    static __always_inline typeof(name(0)) ___body_##name(context, ##__VA_ARGS__);                 \
    typeof(name(0)) name(context)                                                                  \
    {                                                                                              \
        _Pragma("GCC diagnostic push")                                                             \
            _Pragma("GCC diagnostic ignored \"-Wint-conversion\"") return ___body_##name(          \
                ___pick(arguments, ##__VA_ARGS__)(__VA_ARGS__));                                   \
        _Pragma("GCC diagnostic pop")                                                              \
    }                                                                                              \
    static __always_inline typeof(name(0)) ___body_##name(context, ##__VA_ARGS__)

/* raw tracepoints, fentry, fexit, LSM: an array of 64-bit values */
#define ___values0() ctx
#define ___values1(a) ___values0(), (void *)ctx[0]
#define ___values2(a, b) ___values1(a), (void *)ctx[1]
#define ___values3(a, b, c) ___values2(a, b), (void *)ctx[2]
#define ___values4(a, b, c, d) ___values3(a, b, c), (void *)ctx[3]
#define ___values5(a, b, c, d, e) ___values4(a, b, c, d), (void *)ctx[4]
#define ___values6(a, b, c, d, e, f) ___values5(a, b, c, d, e), (void *)ctx[5]
#define ___values7(a, b, c, d, e, f, g) ___values6(a, b, c, d, e, f), (void *)ctx[6]
#define ___values8(a, b, c, d, e, f, g, h) ___values7(a, b, c, d, e, f, g), (void *)ctx[7]
#define ___values9(a, b, c, d, e, f, g, h, i) ___values8(a, b, c, d, e, f, g, h), (void *)ctx[8]
#define ___values10(a, b, c, d, e, f, g, h, i, j)                                                  \
    ___values9(a, b, c, d, e, f, g, h, i), (void *)ctx[9]
#define ___values11(a, b, c, d, e, f, g, h, i, j, k)                                               \
    ___values10(a, b, c, d, e, f, g, h, i, j), (void *)ctx[10]
#define ___values12(a, b, c, d, e, f, g, h, i, j, k, l)                                            \
    ___values11(a, b, c, d, e, f, g, h, i, j, k), (void *)ctx[11]
#define BPF_PROG(name, args...) ___as_function(name, unsigned long long *ctx, ___values, ##args)

/* kprobes and uprobes: registers */
#define ___params0() ctx
#define ___params1(a) ___params0(), (void *)PT_REGS_PARM1(ctx)
#define ___params2(a, b) ___params1(a), (void *)PT_REGS_PARM2(ctx)
#define ___params3(a, b, c) ___params2(a, b), (void *)PT_REGS_PARM3(ctx)
#define ___params4(a, b, c, d) ___params3(a, b, c), (void *)PT_REGS_PARM4(ctx)
#define ___params5(a, b, c, d, e) ___params4(a, b, c, d), (void *)PT_REGS_PARM5(ctx)
#define ___params6(a, b, c, d, e, f) ___params5(a, b, c, d, e), (void *)PT_REGS_PARM6(ctx)
#define ___params7(a, b, c, d, e, f, g) ___params6(a, b, c, d, e, f), (void *)PT_REGS_PARM7(ctx)
#define ___params8(a, b, c, d, e, f, g, h) ___params7(a, b, c, d, e, f, g), (void *)PT_REGS_PARM8(ctx)
#define BPF_KPROBE(name, args...) ___as_function(name, struct pt_regs *ctx, ___params, ##args)
#define BPF_UPROBE(name, args...) BPF_KPROBE(name, ##args)

/* their returns: the one result */
#define ___result0() ctx
#define ___result1(a) ctx, (void *)PT_REGS_RC(ctx)
#define BPF_KRETPROBE(name, args...) ___as_function(name, struct pt_regs *ctx, ___result, ##args)
#define BPF_URETPROBE(name, args...) BPF_KRETPROBE(name, ##args)

/* system calls: since Linux 4.17 the function has one argument on these processors, the registers
 * of the caller; where a kernel has none of these wrappers, they are its own registers. */
extern _Bool LINUX_HAS_SYSCALL_WRAPPER __kconfig;
#define ___sysargs0() ctx
#define ___sysargs1(a) ___sysargs0(), (void *)PT_REGS_PARM1_CORE_SYSCALL(regs)
#define ___sysargs2(a, b) ___sysargs1(a), (void *)PT_REGS_PARM2_CORE_SYSCALL(regs)
#define ___sysargs3(a, b, c) ___sysargs2(a, b), (void *)PT_REGS_PARM3_CORE_SYSCALL(regs)
#define ___sysargs4(a, b, c, d) ___sysargs3(a, b, c), (void *)PT_REGS_PARM4_CORE_SYSCALL(regs)
#define ___sysargs5(a, b, c, d, e) ___sysargs4(a, b, c, d), (void *)PT_REGS_PARM5_CORE_SYSCALL(regs)
#define ___sysargs6(a, b, c, d, e, f) ___sysargs5(a, b, c, d, e), (void *)PT_REGS_PARM6_CORE_SYSCALL(regs)
#define ___owned0() ctx
#define ___owned1(a) ___owned0(), (void *)PT_REGS_PARM1_SYSCALL(regs)
#define ___owned2(a, b) ___owned1(a), (void *)PT_REGS_PARM2_SYSCALL(regs)
#define ___owned3(a, b, c) ___owned2(a, b), (void *)PT_REGS_PARM3_SYSCALL(regs)
#define ___owned4(a, b, c, d) ___owned3(a, b, c), (void *)PT_REGS_PARM4_SYSCALL(regs)
#define ___owned5(a, b, c, d, e) ___owned4(a, b, c, d), (void *)PT_REGS_PARM5_SYSCALL(regs)
#define ___owned6(a, b, c, d, e, f) ___owned5(a, b, c, d, e), (void *)PT_REGS_PARM6_SYSCALL(regs)
#define BPF_KSYSCALL(name, args...)                                                                \
    name(struct pt_regs *ctx);                                                                     \
    static __always_inline typeof(name(0)) ___body_##name(struct pt_regs *ctx, ##args);            \
    typeof(name(0)) name(struct pt_regs *ctx)                                                      \
    {                                                                                              \
        struct pt_regs *regs =                                                                     \
            LINUX_HAS_SYSCALL_WRAPPER ? PT_REGS_SYSCALL_REGS(ctx) : ctx;                           \
        _Pragma("GCC diagnostic push")                                                             \
            _Pragma("GCC diagnostic ignored \"-Wint-conversion\"") if (                            \
                LINUX_HAS_SYSCALL_WRAPPER) return                                                  \
            ___body_##name(___pick(___sysargs, ##args)(args));                                     \
        else return ___body_##name(___pick(___owned, ##args)(args));                               \
        _Pragma("GCC diagnostic pop")                                                              \
    }                                                                                              \
    static __always_inline typeof(name(0)) ___body_##name(struct pt_regs *ctx, ##args)
#define BPF_KPROBE_SYSCALL BPF_KSYSCALL

#include "bpf_core_read.h"

#endif
