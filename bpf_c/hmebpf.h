/* Shared by the bundled programs: what the kernel's UAPI headers would give, so that none is needed,
 * and the few facts that differ between architectures.  Structures internal to the kernel are not
 * here: they are generated from the running kernel's BTF, for the members that a program names.
 *
 * Only types and macros belong here: BCC rewrites map.method() in the main file alone. */
#pragma once

/* ---- architecture: the one place that knows any ---------------------------------------------- */

#if defined(__x86_64__) || defined(__TARGET_ARCH_x86) || defined(bpf_target_x86)
/* arch/x86/include/asm/ptrace.h */
struct pt_regs {
	u64 r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di;
	u64 orig_ax, ip, cs, flags, sp, ss;
};
/* Arguments of a system call in the registers with which user space entered the kernel. */
#define SYSCALL_ARG1(regs) ((regs)->di)
#define SYSCALL_ARG2(regs) ((regs)->si)
#define SYSCALL_ARG3(regs) ((regs)->dx)
#define SYSCALL_ARG4(regs) ((regs)->r10)
#define SYSCALL_ARG5(regs) ((regs)->r8)
/* The same for 32-bit programs. */
#define COMPAT_ARG1(regs) ((regs)->bx)
#define COMPAT_ARG2(regs) ((regs)->cx)
#define COMPAT_ARG3(regs) ((regs)->dx)
/* First argument and return value of a kernel function, for kprobes and kretprobes. */
#define FUNCTION_ARG1(regs) ((regs)->di)
#define FUNCTION_RESULT(regs) ((regs)->ax)
/* Of a system call that is under way: its number, and whether a 32-bit program made it, whose numbers
 * and structures are others (__USER32_CS, arch/x86/include/asm/segment.h). */
#define SYSCALL_NUMBER(regs) ((regs)->orig_ax)
#define SYSCALL_IS_COMPAT(regs) ((u16)(regs)->cs == 0x23)
/* arch/x86/entry/syscalls/syscall_64.tbl */
#define NR_CLOSE 3
#define NR_EXECVEAT 322
#define NR_CONNECT 42
#define NR_ACCEPT 43
#define NR_SENDTO 44
#define NR_RECVFROM 45
#define NR_SENDMSG 46
#define NR_RECVMSG 47
#define NR_ACCEPT4 288
#define NR_RECVMMSG 299
#define NR_SENDMMSG 307
#elif defined(__aarch64__) || defined(__TARGET_ARCH_arm64) || defined(bpf_target_arm64)
/* arch/arm64/include/uapi/asm/ptrace.h: struct user_pt_regs, with which pt_regs begins; what follows
 * is in arch/arm64/include/asm/ptrace.h (little-endian; since Linux 4.15) */
struct pt_regs {
	u64 regs[31];
	u64 sp, pc, pstate, orig_x0;
	s32 syscallno;
	u32 unused2;
};
#define SYSCALL_ARG1(r) ((r)->orig_x0) /* regs[0] becomes the result */
#define SYSCALL_ARG2(r) ((r)->regs[1])
#define SYSCALL_ARG3(r) ((r)->regs[2])
#define SYSCALL_ARG4(r) ((r)->regs[3])
#define SYSCALL_ARG5(r) ((r)->regs[4])
#define COMPAT_ARG1(r) ((r)->orig_x0)
#define COMPAT_ARG2(r) ((r)->regs[1])
#define COMPAT_ARG3(r) ((r)->regs[2])
#define FUNCTION_ARG1(r) ((r)->regs[0])
#define FUNCTION_RESULT(r) ((r)->regs[0])
#define SYSCALL_NUMBER(r) ((r)->syscallno)
#define SYSCALL_IS_COMPAT(r) (((r)->pstate & 0x10) != 0) /* PSR_MODE32_BIT */
/* include/uapi/asm-generic/unistd.h */
#define NR_CLOSE 57
#define NR_EXECVEAT 281
#define NR_ACCEPT 202
#define NR_CONNECT 203
#define NR_SENDTO 206
#define NR_RECVFROM 207
#define NR_SENDMSG 211
#define NR_RECVMSG 212
#define NR_ACCEPT4 242
#define NR_RECVMMSG 243
#define NR_SENDMMSG 269
#else
#error "hmebpf knows x86-64 and arm64"
#endif

/* ---- system call tracepoints: events/syscalls/sys_enter_* and sys_exit_*, format since 2.6.33 ----
 *
 * `nr` is an int in newer kernels, with four bytes behind it that nobody writes, and was a long; on
 * little-endian machines the lower half is the number in both. */

struct sys_enter {
	u64 common;
	s32 nr;
	u32 unused;
	u64 args[6];
};

struct sys_exit {
	u64 common;
	s32 nr;
	u32 unused;
	s64 ret;
};

/* ---- packets --------------------------------------------------------------------------------- */

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88A8

#define IPPROTO_HOPOPTS 0
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH 51
#define IPPROTO_DSTOPTS 60
#define IPPROTO_MH 135
#define IPPROTO_SCTP 132
#define IPPROTO_UDPLITE 136
#define IPPROTO_DCCP 33

/* All packet fields are in network byte order. */
#define from_be16(x) __builtin_bswap16(x)
#define to_be16(x) __builtin_bswap16(x)

struct eth_header {
	u8 destination[6];
	u8 source[6];
	__be16 type;
} __attribute__((packed));

struct vlan_header {
	__be16 tag;
	__be16 type;
} __attribute__((packed));

struct ipv4_header {
	u8 version_and_words;
	u8 service;
	__be16 length;
	__be16 id;
	__be16 fragment; /* 3 flag bits, 13 bits of offset */
	u8 ttl;
	u8 protocol;
	__be16 checksum;
	__be32 source;
	__be32 destination;
} __attribute__((packed));

#define IPV4_FRAGMENT_OFFSET 0x1FFF
#define IPV4_MORE_FRAGMENTS 0x2000

struct ipv6_header {
	__be32 version_class_flow;
	__be16 length;
	u8 next;
	u8 hop_limit;
	u32 source[4];
	u32 destination[4];
} __attribute__((packed));

/* How hop-by-hop, routing, destination and mobility headers begin; length in 8 bytes, less one. */
struct ipv6_extension {
	u8 next;
	u8 length;
	__be16 fragment; /* of a fragment header: 13 bits of offset, 2 reserved, 1 more-fragments */
} __attribute__((packed));

#define IPV6_FRAGMENT_OFFSET 0xFFF8
#define IPV6_MORE_FRAGMENTS 0x0001

/* TCP, UDP, SCTP, DCCP and UDP-Lite all begin with the two ports. */
struct ports {
	__be16 source;
	__be16 destination;
} __attribute__((packed));

/* ---- small helpers as macros ------------------------------------------------------------------ */

#define offsetof(type, member) __builtin_offsetof(type, member)
#define min_of(a, b) ((a) < (b) ? (a) : (b))

/* What clang knows of a variable ends here: it checks the variable itself and not, as it likes to, a
 * value that it was made from or a copy, of which older verifiers draw no conclusion. */
#define hide_from_clang(variable) asm volatile("" : "+r"(variable))

#ifdef SAMPLED /* by --max-overhead: docs/overhead.md */
/* A CPU's random numbers, and how many events each one that is taken stands for besides itself: a power
 * of two, less one. */
struct sampling {
	u64 random;
	u64 others;
};

/* How many events this one stands for; 0 if it is to be passed over.  It counts for those that are: so
 * counters stay estimates of everything while the share changes.  By a congruential generator (Knuth's
 * MMIX), of which the upper bits are good, because bpf_get_prandom_u32() costs as much as the rest of a
 * program that counts packets. */
static __always_inline u32 weigh(struct sampling *sampling)
{
	if (!sampling || !sampling->others)
		return 1;
	sampling->random = sampling->random * 6364136223846793005ULL + 1442695040888963407ULL;
	return (sampling->random >> 32) & sampling->others ? 0 : sampling->others + 1;
}
#endif

/* Position of the highest set bit, 0 for 0 and 1: log2 rounded down, for values below 2^32.  Without
 * a branch: the verifier would follow each of 32 ways through the rest of the program. */
static __always_inline u64 log2_of(u64 value)
{
	u64 result = 0, step;
	step = (0xFFFF - value) >> 63 << 4; value >>= step; result += step;
	step = (0xFF - value) >> 63 << 3; value >>= step; result += step;
	step = (0xF - value) >> 63 << 2; value >>= step; result += step;
	step = (0x3 - value) >> 63 << 1; value >>= step; result += step;
	return result + (value >> 1);
}
