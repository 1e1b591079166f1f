/* Byte orders: network order is big-endian, and a program has the order of the machine it was
 * compiled for.  The compiler computes what is constant. */
#ifndef HMEBPF_BPF_ENDIAN_H
#define HMEBPF_BPF_ENDIAN_H

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ___big16(x) ((__u16)__builtin_bswap16(x))
#define ___big32(x) ((__u32)__builtin_bswap32(x))
#define ___big64(x) ((__u64)__builtin_bswap64(x))
#define ___little16(x) ((__u16)(x))
#define ___little32(x) ((__u32)(x))
#define ___little64(x) ((__u64)(x))
#elif __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define ___big16(x) ((__u16)(x))
#define ___big32(x) ((__u32)(x))
#define ___big64(x) ((__u64)(x))
#define ___little16(x) ((__u16)__builtin_bswap16(x))
#define ___little32(x) ((__u32)__builtin_bswap32(x))
#define ___little64(x) ((__u64)__builtin_bswap64(x))
#else
#error "the compiler does not tell the byte order: compile with clang -target bpf"
#endif

#define bpf_htons(x) ___big16(x)
#define bpf_ntohs(x) ___big16(x)
#define bpf_htonl(x) ___big32(x)
#define bpf_ntohl(x) ___big32(x)
#define bpf_cpu_to_be64(x) ___big64(x)
#define bpf_be64_to_cpu(x) ___big64(x)
#define bpf_cpu_to_le16(x) ___little16(x)
#define bpf_le16_to_cpu(x) ___little16(x)
#define bpf_cpu_to_le32(x) ___little32(x)
#define bpf_le32_to_cpu(x) ___little32(x)
#define bpf_cpu_to_le64(x) ___little64(x)
#define bpf_le64_to_cpu(x) ___little64(x)

#endif
