/* What every program starts from: sections, map declarations, externs, printing.
 *
 * The names are those that programs written for libbpf use.  Include vmlinux.h (or linux/types.h and
 * linux/bpf.h) before it. */
#ifndef HMEBPF_BPF_HELPERS_H
#define HMEBPF_BPF_HELPERS_H

#include "bpf_helper_defs.h"

/* SEC("xdp") int f(struct xdp_md *ctx): the section tells the loader where the function runs. */
#define SEC(name)                                                                                  \
    _Pragma("GCC diagnostic push") _Pragma("GCC diagnostic ignored \"-Wignored-attributes\"")      \
        __attribute__((section(name), used)) _Pragma("GCC diagnostic pop")

/* A map is a structure whose members' types tell its properties:
 *     struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 1024);
 *              __type(key, __u32); __type(value, __u64); } counts SEC(".maps"); */
#define __uint(name, number) int (*name)[number]
#define __type(name, type) typeof(type) *name
#define __array(name, type) typeof(type) *name[]
#define ___glue(a, b) a##b
#define ___unique(a, b) ___glue(a, b)
#define __ulong(name, number)                                                                      \
    enum { ___unique(___ulong_##name, __COUNTER__) = (number) } name

/* pinning: with LIBBPF_PIN_BY_NAME a map that is pinned under its name is used. */
enum libbpf_pin_type { LIBBPF_PIN_NONE, LIBBPF_PIN_BY_NAME };

/* Values of a three-way kernel setting: extern enum libbpf_tristate CONFIG_X __kconfig; */
enum libbpf_tristate { TRI_NO = 0, TRI_YES = 1, TRI_MODULE = 2 };

#undef __always_inline
#define __always_inline inline __attribute__((always_inline))
#undef __noinline
#define __noinline __attribute__((noinline))
#undef __weak
#define __weak __attribute__((weak))
#ifndef __hidden
#define __hidden __attribute__((visibility("hidden")))
#endif
#ifndef __must_check
#define __must_check __attribute__((warn_unused_result))
#endif

/* Externs that the loader fills in: the kernel's configuration, its symbols and functions. */
#define __kconfig __attribute__((section(".kconfig")))
#define __ksym __attribute__((section(".ksyms")))
#define bpf_ksym_exists(symbol) (!!(symbol))

/* Pointers to kernel objects in maps, and arguments that the verifier is told about. */
#if __has_attribute(btf_type_tag)
#define __kptr_untrusted __attribute__((btf_type_tag("kptr_untrusted")))
#define __kptr __attribute__((btf_type_tag("kptr")))
#define __percpu_kptr __attribute__((btf_type_tag("percpu_kptr")))
#define __uptr __attribute__((btf_type_tag("uptr")))
#else
#define __kptr_untrusted
#define __kptr
#define __percpu_kptr
#define __uptr
#endif
#if __has_attribute(btf_decl_tag)
#define ___arg(tag) __attribute__((btf_decl_tag("arg:" tag)))
#else
#define ___arg(tag)
#endif
#define __arg_ctx ___arg("ctx")
#define __arg_nonnull ___arg("nonnull")
#define __arg_nullable ___arg("nullable")
#define __arg_trusted ___arg("trusted")
#define __arg_arena ___arg("arena")

#ifndef NULL
#define NULL ((void *)0)
#endif
#ifndef offsetof
#define offsetof(type, member) ((unsigned long)&((type *)0)->member)
#endif
#ifndef container_of
#define container_of(pointer, type, member)                                                        \
    ({                                                                                             \
        void *___inside = (void *)(pointer);                                                       \
        ((type *)(___inside - offsetof(type, member)));                                            \
    })
#endif
#ifndef KERNEL_VERSION
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#endif

/* Keep the compiler from moving accesses, or from what it thinks that it knows of a variable. */
#ifndef barrier
#define barrier() asm volatile("" ::: "memory")
#endif
#ifndef barrier_var
#define barrier_var(variable) asm volatile("" : "+r"(variable))
#endif
/* A place that is never reached: compilation fails if the compiler cannot see that. */
#ifndef __bpf_unreachable
#define __bpf_unreachable() __builtin_trap()
#endif

/* A tail call to a constant place in a program array; the kernel makes a plain jump of it (5.5). */
#if defined(__bpf__)
static __always_inline void bpf_tail_call_static(void *ctx, const void *map, const __u32 slot)
{
    if (!__builtin_constant_p(slot))
        __bpf_unreachable();
    /* In assembler, so that the constant cannot be merged with that of another branch. */
    asm volatile("r1 = %[ctx]\n\t"
                 "r2 = %[map]\n\t"
                 "r3 = %[slot]\n\t"
                 "call 12\n\t" ::[ctx] "r"(ctx),
                 [map] "r"(map), [slot] "i"(slot)
                 : "r0", "r1", "r2", "r3", "r4", "r5", "memory");
}
#endif

/* -- printing: formats as in printk, each value converted to 64 bits */

#define ___count(...) ___count_(_, ##__VA_ARGS__, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
#define ___count_(_, a, b, c, d, e, f, g, h, i, j, k, l, count, ...) count
#define ___pick(macro, ...) ___unique(macro, ___count(__VA_ARGS__))

#define ___fill0(to)
#define ___fill1(to, a) to[0] = (unsigned long long)(a);
#define ___fill2(to, a, b) ___fill1(to, a) to[1] = (unsigned long long)(b);
#define ___fill3(to, a, b, c) ___fill2(to, a, b) to[2] = (unsigned long long)(c);
#define ___fill4(to, a, b, c, d) ___fill3(to, a, b, c) to[3] = (unsigned long long)(d);
#define ___fill5(to, a, b, c, d, e) ___fill4(to, a, b, c, d) to[4] = (unsigned long long)(e);
#define ___fill6(to, a, b, c, d, e, f)                                                             \
    ___fill5(to, a, b, c, d, e) to[5] = (unsigned long long)(f);
#define ___fill7(to, a, b, c, d, e, f, g)                                                          \
    ___fill6(to, a, b, c, d, e, f) to[6] = (unsigned long long)(g);
#define ___fill8(to, a, b, c, d, e, f, g, h)                                                       \
    ___fill7(to, a, b, c, d, e, f, g) to[7] = (unsigned long long)(h);
#define ___fill9(to, a, b, c, d, e, f, g, h, i)                                                    \
    ___fill8(to, a, b, c, d, e, f, g, h) to[8] = (unsigned long long)(i);
#define ___fill10(to, a, b, c, d, e, f, g, h, i, j)                                                \
    ___fill9(to, a, b, c, d, e, f, g, h, i) to[9] = (unsigned long long)(j);
#define ___fill11(to, a, b, c, d, e, f, g, h, i, j, k)                                             \
    ___fill10(to, a, b, c, d, e, f, g, h, i, j) to[10] = (unsigned long long)(k);
#define ___fill12(to, a, b, c, d, e, f, g, h, i, j, k, l)                                          \
    ___fill11(to, a, b, c, d, e, f, g, h, i, j, k) to[11] = (unsigned long long)(l);

#define ___with_values(values, fmt, call, ...)                                                     \
    ({                                                                                             \
        static const char ___fmt[] = fmt;                                                          \
        unsigned long long values[___count(__VA_ARGS__) ?: 1];                                     \
        _Pragma("GCC diagnostic push")                                                             \
            _Pragma("GCC diagnostic ignored \"-Wint-conversion\"")                                 \
                ___pick(___fill, ##__VA_ARGS__)(values, ##__VA_ARGS__)                             \
                    _Pragma("GCC diagnostic pop") call;                                            \
    })

/* Into the buffer out of size bytes (Linux 5.13). */
#define BPF_SNPRINTF(out, size, fmt, ...)                                                          \
    ___with_values(___values, fmt,                                                                 \
                   bpf_snprintf(out, size, ___fmt, (void *)___values,                              \
                                8 * ___count(__VA_ARGS__)),                                        \
                   ##__VA_ARGS__)

/* Into the output of an iterator program (Linux 5.8). */
#define BPF_SEQ_PRINTF(seq, fmt, ...)                                                              \
    ___with_values(___values, fmt,                                                                 \
                   bpf_seq_printf(seq, ___fmt, sizeof(___fmt), ___values,                          \
                                  8 * ___count(__VA_ARGS__)),                                      \
                   ##__VA_ARGS__)

/* Into /sys/kernel/tracing/trace_pipe: up to three values on every kernel, more since 5.16. */
#ifdef BPF_NO_GLOBAL_DATA
#define BPF_PRINTK_FMT_MOD
#else
#define BPF_PRINTK_FMT_MOD static const
#endif

#define ___trace_printk(fmt, ...)                                                                  \
    ({                                                                                             \
        BPF_PRINTK_FMT_MOD char ___fmt[] = fmt;                                                    \
        bpf_trace_printk(___fmt, sizeof(___fmt), ##__VA_ARGS__);                                   \
    })
#define ___trace_vprintk(fmt, ...)                                                                 \
    ___with_values(___values, fmt,                                                                 \
                   bpf_trace_vprintk(___fmt, sizeof(___fmt), ___values,                            \
                                     8 * ___count(__VA_ARGS__)),                                   \
                   ##__VA_ARGS__)
#define ___printk0 ___trace_printk
#define ___printk1 ___trace_printk
#define ___printk2 ___trace_printk
#define ___printk3 ___trace_printk
#define ___printk4 ___trace_vprintk
#define ___printk5 ___trace_vprintk
#define ___printk6 ___trace_vprintk
#define ___printk7 ___trace_vprintk
#define ___printk8 ___trace_vprintk
#define ___printk9 ___trace_vprintk
#define ___printk10 ___trace_vprintk
#define ___printk11 ___trace_vprintk
#define ___printk12 ___trace_vprintk
#define bpf_printk(fmt, ...) ___pick(___printk, ##__VA_ARGS__)(fmt, ##__VA_ARGS__)

/* -- loops that the verifier walks once (Linux 6.4) */

struct bpf_iter_num;
extern int bpf_iter_num_new(struct bpf_iter_num *it, int start, int end) __weak __ksym;
extern int *bpf_iter_num_next(struct bpf_iter_num *it) __weak __ksym;
extern void bpf_iter_num_destroy(struct bpf_iter_num *it) __weak __ksym;

/* bpf_for(i, 0, n) { ... }: i from start to end - 1 */
#ifndef bpf_for
#define bpf_for(i, start, end)                                                                     \
    for (struct bpf_iter_num ___it __attribute__((aligned(8), cleanup(bpf_iter_num_destroy))),     \
         *___once __attribute__((unused)) = (bpf_iter_num_new(&___it, (start), (end)),             \
                                             (void)bpf_iter_num_destroy, (void *)0);               \
         ({                                                                                        \
             int *___next = bpf_iter_num_next(&___it);                                             \
             ___next && ((i) = *___next, (i) >= (start) && (i) < (end));                           \
         });)
#endif
/* bpf_repeat(n) { ... } */
#ifndef bpf_repeat
#define bpf_repeat(n)                                                                              \
    for (struct bpf_iter_num ___it __attribute__((aligned(8), cleanup(bpf_iter_num_destroy))),     \
         *___once __attribute__((unused)) = (bpf_iter_num_new(&___it, 0, (n)),                     \
                                             (void)bpf_iter_num_destroy, (void *)0);               \
         bpf_iter_num_next(&___it);)
#endif

#endif
