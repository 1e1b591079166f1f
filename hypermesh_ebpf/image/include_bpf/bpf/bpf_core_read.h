/* Reading kernel structures by the offsets of the kernel that runs (CO-RE: compile once, run
 * everywhere): the compiler notes which member is meant, the loader puts in where it is.
 *
 * Types from vmlinux.h are noted without further ado where a program may read them directly; where
 * it has to copy (kprobes, tracepoints), these macros do it:
 *     BPF_CORE_READ(task, mm, exe_file, f_path.dentry, d_name.name)
 */
#ifndef HMEBPF_BPF_CORE_READ_H
#define HMEBPF_BPF_CORE_READ_H

#include "bpf_helpers.h"

/* -- questions to the running kernel.  The numbers are enum bpf_core_relo_kind of the kernel, less
 * what each builtin adds. */

enum bpf_field_info_kind {
    BPF_FIELD_BYTE_OFFSET = 0,
    BPF_FIELD_BYTE_SIZE = 1,
    BPF_FIELD_EXISTS = 2,
    BPF_FIELD_SIGNED = 3,
    BPF_FIELD_LSHIFT_U64 = 4,
    BPF_FIELD_RSHIFT_U64 = 5,
};
enum bpf_type_id_kind { BPF_TYPE_ID_LOCAL = 0, BPF_TYPE_ID_TARGET = 1 };
enum bpf_type_info_kind { BPF_TYPE_EXISTS = 0, BPF_TYPE_SIZE = 1, BPF_TYPE_MATCHES = 2 };
enum bpf_enum_value_kind { BPF_ENUMVAL_EXISTS = 0, BPF_ENUMVAL_VALUE = 1 };

/* A member is named as pointer->member, or as (struct type, member). */
#define ___member1(member) member
#define ___member2(type, member) ((typeof(type) *)0)->member
#define ___member(...) ___pick(___member, ##__VA_ARGS__)(__VA_ARGS__)
#define ___field(kind, ...) __builtin_preserve_field_info(___member(__VA_ARGS__), kind)

#define bpf_core_field_exists(field...) ___field(BPF_FIELD_EXISTS, ##field)
#define bpf_core_field_size(field...) ___field(BPF_FIELD_BYTE_SIZE, ##field)
#define bpf_core_field_offset(field...) ___field(BPF_FIELD_BYTE_OFFSET, ##field)

#define ___type_info(type, kind) __builtin_preserve_type_info(*(typeof(type) *)0, kind)
#define bpf_core_type_exists(type) ___type_info(type, BPF_TYPE_EXISTS)
#define bpf_core_type_size(type) ___type_info(type, BPF_TYPE_SIZE)
#define bpf_core_type_matches(type) ___type_info(type, BPF_TYPE_MATCHES)
#define bpf_core_type_id_local(type)                                                               \
    __builtin_btf_type_id(*(typeof(type) *)0, BPF_TYPE_ID_LOCAL)
#define bpf_core_type_id_kernel(type)                                                              \
    __builtin_btf_type_id(*(typeof(type) *)0, BPF_TYPE_ID_TARGET)

#define ___enum_value(type, value, kind)                                                           \
    __builtin_preserve_enum_value(*(typeof(type) *)value, kind)
#define bpf_core_enum_value_exists(type, value) ___enum_value(type, value, BPF_ENUMVAL_EXISTS)
#define bpf_core_enum_value(type, value) ___enum_value(type, value, BPF_ENUMVAL_VALUE)

/* A pointer as one to a kernel type that the verifier trusts (Linux 6.8). */
#define bpf_core_cast(pointer, type)                                                               \
    ((typeof(type) *)bpf_rdonly_cast((pointer), bpf_core_type_id_kernel(type)))
extern void *bpf_rdonly_cast(const void *object, __u32 btf_id) __weak __ksym;

/* -- copies of one member */

#define ___relocated(src) ((const void *)__builtin_preserve_access_index(src))
#define bpf_core_read(dst, size, src) bpf_probe_read_kernel(dst, size, ___relocated(src))
#define bpf_core_read_user(dst, size, src) bpf_probe_read_user(dst, size, ___relocated(src))
#define bpf_core_read_str(dst, size, src) bpf_probe_read_kernel_str(dst, size, ___relocated(src))
#define bpf_core_read_user_str(dst, size, src)                                                     \
    bpf_probe_read_user_str(dst, size, ___relocated(src))

/* A bit field, 64 bits wide: the bytes that hold it, shifted to the left end and back. */
#define ___bits_to(value, s, field)                                                                \
    value <<= ___field(BPF_FIELD_LSHIFT_U64, (s)->field);                                          \
    if (___field(BPF_FIELD_SIGNED, (s)->field))                                                    \
        value = (long long)value >> ___field(BPF_FIELD_RSHIFT_U64, (s)->field);                    \
    else                                                                                           \
        value >>= ___field(BPF_FIELD_RSHIFT_U64, (s)->field);

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ___bits_place(value, s, field) ((void *)&value)
#else
#define ___bits_place(value, s, field)                                                             \
    ((void *)&value + (8 - ___field(BPF_FIELD_BYTE_SIZE, (s)->field)))
#endif

#define BPF_CORE_READ_BITFIELD_PROBED(s, field)                                                    \
    ({                                                                                             \
        unsigned long long ___value = 0;                                                           \
        bpf_probe_read_kernel(___bits_place(___value, s, field),                                   \
                              ___field(BPF_FIELD_BYTE_SIZE, (s)->field),                           \
                              (const void *)(s) + ___field(BPF_FIELD_BYTE_OFFSET, (s)->field));    \
        ___bits_to(___value, s, field) ___value;                                                   \
    })
#define BPF_CORE_READ_BITFIELD(s, field)                                                           \
    ({                                                                                             \
        const void *___at = (const void *)(s) + ___field(BPF_FIELD_BYTE_OFFSET, (s)->field);       \
        unsigned long long ___value = 0;                                                           \
        barrier_var(___at);                                                                        \
        switch (___field(BPF_FIELD_BYTE_SIZE, (s)->field)) {                                       \
        case 1:                                                                                    \
            ___value = *(const unsigned char *)___at;                                              \
            break;                                                                                 \
        case 2:                                                                                    \
            ___value = *(const unsigned short *)___at;                                             \
            break;                                                                                 \
        case 4:                                                                                    \
            ___value = *(const unsigned int *)___at;                                               \
            break;                                                                                 \
        case 8:                                                                                    \
            ___value = *(const unsigned long long *)___at;                                         \
            break;                                                                                 \
        }                                                                                          \
        ___bits_to(___value, s, field) ___value;                                                   \
    })

/* -- a way through several pointers: s->a->b->c, each pointer copied before it is followed.
 * ___path gives the expression for its type, ___hops the copies of all pointers but the last. */

#define ___path1(s, a) (s)->a
#define ___path2(s, a, b) (s)->a->b
#define ___path3(s, a, b, c) (s)->a->b->c
#define ___path4(s, a, b, c, d) (s)->a->b->c->d
#define ___path5(s, a, b, c, d, e) (s)->a->b->c->d->e
#define ___path6(s, a, b, c, d, e, f) (s)->a->b->c->d->e->f
#define ___path7(s, a, b, c, d, e, f, g) (s)->a->b->c->d->e->f->g
#define ___path8(s, a, b, c, d, e, f, g, h) (s)->a->b->c->d->e->f->g->h
#define ___path9(s, a, b, c, d, e, f, g, h, i) (s)->a->b->c->d->e->f->g->h->i
#define ___path(s, ...) ___pick(___path, __VA_ARGS__)(s, __VA_ARGS__)
#define ___kind_of(s, ...) typeof(___path(s, __VA_ARGS__))

#define ___hop(read, at, from, member)                                                             \
    read((void *)&at, sizeof(at), &((typeof(from))(at))->member);
#define ___hops1(read, at, s, a) at = (const void *)(s);
#define ___hops2(read, at, s, a, b)                                                                 \
    ___hops1(read, at, s, a) ___hop(read, at, (s), a)
#define ___hops3(read, at, s, a, b, c)                                                              \
    ___hops2(read, at, s, a, b) ___hop(read, at, (s)->a, b)
#define ___hops4(read, at, s, a, b, c, d)                                                           \
    ___hops3(read, at, s, a, b, c) ___hop(read, at, (s)->a->b, c)
#define ___hops5(read, at, s, a, b, c, d, e)                                                        \
    ___hops4(read, at, s, a, b, c, d) ___hop(read, at, (s)->a->b->c, d)
#define ___hops6(read, at, s, a, b, c, d, e, f)                                                     \
    ___hops5(read, at, s, a, b, c, d, e) ___hop(read, at, (s)->a->b->c->d, e)
#define ___hops7(read, at, s, a, b, c, d, e, f, g)                                                  \
    ___hops6(read, at, s, a, b, c, d, e, f) ___hop(read, at, (s)->a->b->c->d->e, f)
#define ___hops8(read, at, s, a, b, c, d, e, f, g, h)                                               \
    ___hops7(read, at, s, a, b, c, d, e, f, g) ___hop(read, at, (s)->a->b->c->d->e->f, g)
#define ___hops9(read, at, s, a, b, c, d, e, f, g, h, i)                                            \
    ___hops8(read, at, s, a, b, c, d, e, f, g, h) ___hop(read, at, (s)->a->b->c->d->e->f->g, h)

#define ___last1(read, dst, size, at, s, a)                                                         \
    read((void *)(dst), size, &((typeof((s)))(at))->a)
#define ___last2(read, dst, size, at, s, a, b)                                                      \
    read((void *)(dst), size, &((typeof((s)->a))(at))->b)
#define ___last3(read, dst, size, at, s, a, b, c)                                                   \
    read((void *)(dst), size, &((typeof((s)->a->b))(at))->c)
#define ___last4(read, dst, size, at, s, a, b, c, d)                                                \
    read((void *)(dst), size, &((typeof((s)->a->b->c))(at))->d)
#define ___last5(read, dst, size, at, s, a, b, c, d, e)                                             \
    read((void *)(dst), size, &((typeof((s)->a->b->c->d))(at))->e)
#define ___last6(read, dst, size, at, s, a, b, c, d, e, f)                                          \
    read((void *)(dst), size, &((typeof((s)->a->b->c->d->e))(at))->f)
#define ___last7(read, dst, size, at, s, a, b, c, d, e, f, g)                                       \
    read((void *)(dst), size, &((typeof((s)->a->b->c->d->e->f))(at))->g)
#define ___last8(read, dst, size, at, s, a, b, c, d, e, f, g, h)                                    \
    read((void *)(dst), size, &((typeof((s)->a->b->c->d->e->f->g))(at))->h)
#define ___last9(read, dst, size, at, s, a, b, c, d, e, f, g, h, i)                                 \
    read((void *)(dst), size, &((typeof((s)->a->b->c->d->e->f->g->h))(at))->i)

/* read copies pointers on the way, finish the last member. */
#define ___walk(read, finish, dst, size, s, ...)                                                   \
    ({                                                                                             \
        const void *___at;                                                                         \
        ___pick(___hops, __VA_ARGS__)(read, ___at, s, __VA_ARGS__)                                 \
            ___pick(___last, __VA_ARGS__)(finish, dst, size, ___at, s, __VA_ARGS__);               \
    })
#define ___walk_value(read, s, ...)                                                                \
    ({                                                                                             \
        ___kind_of(s, __VA_ARGS__) ___result;                                                      \
        ___walk(read, read, &___result, sizeof(___result), s, __VA_ARGS__);                        \
        ___result;                                                                                 \
    })
#define ___walk_into(read, finish, dst, s, ...)                                                    \
    ___walk(read, finish, dst, sizeof(*(dst)), s, __VA_ARGS__)

/* The value; all zero where an address cannot be read. */
#define BPF_CORE_READ(s, a, ...) ___walk_value(bpf_core_read, s, a, ##__VA_ARGS__)
#define BPF_CORE_READ_USER(s, a, ...) ___walk_value(bpf_core_read_user, s, a, ##__VA_ARGS__)

/* Into *dst; 0, or a negative error of the last copy.  Strings: the length with the NUL. */
#define BPF_CORE_READ_INTO(dst, s, a, ...)                                                         \
    ___walk_into(bpf_core_read, bpf_core_read, dst, s, a, ##__VA_ARGS__)
#define BPF_CORE_READ_USER_INTO(dst, s, a, ...)                                                    \
    ___walk_into(bpf_core_read_user, bpf_core_read_user, dst, s, a, ##__VA_ARGS__)
#define BPF_CORE_READ_STR_INTO(dst, s, a, ...)                                                     \
    ___walk_into(bpf_core_read, bpf_core_read_str, dst, s, a, ##__VA_ARGS__)
#define BPF_CORE_READ_USER_STR_INTO(dst, s, a, ...)                                                \
    ___walk_into(bpf_core_read_user, bpf_core_read_user_str, dst, s, a, ##__VA_ARGS__)

/* The same without relocation: for structures whose layout never changes. */
#define BPF_PROBE_READ(s, a, ...) ___walk_value(bpf_probe_read_kernel, s, a, ##__VA_ARGS__)
#define BPF_PROBE_READ_USER(s, a, ...) ___walk_value(bpf_probe_read_user, s, a, ##__VA_ARGS__)
#define BPF_PROBE_READ_INTO(dst, s, a, ...)                                                        \
    ___walk_into(bpf_probe_read_kernel, bpf_probe_read_kernel, dst, s, a, ##__VA_ARGS__)
#define BPF_PROBE_READ_USER_INTO(dst, s, a, ...)                                                   \
    ___walk_into(bpf_probe_read_user, bpf_probe_read_user, dst, s, a, ##__VA_ARGS__)
#define BPF_PROBE_READ_STR_INTO(dst, s, a, ...)                                                    \
    ___walk_into(bpf_probe_read_kernel, bpf_probe_read_kernel_str, dst, s, a, ##__VA_ARGS__)
#define BPF_PROBE_READ_USER_STR_INTO(dst, s, a, ...)                                               \
    ___walk_into(bpf_probe_read_user, bpf_probe_read_user_str, dst, s, a, ##__VA_ARGS__)

#endif
