/* Macros and inline functions of kernel headers that programs are written with, over the types of
 * the kernel's own BTF.  Nothing here does more than arithmetic or follow a member: what a BPF
 * program may not do (locks, per-CPU pointers, the current task) is not here. */

/* -- C */
#define offsetof(type, member) __builtin_offsetof(type, member)
#define sizeof_field(type, member) sizeof(((type *)0)->member)
#define offsetofend(type, member) (offsetof(type, member) + sizeof_field(type, member))
#define typeof_member(type, member) typeof(((type *)0)->member)
#define container_of(pointer, type, member) \
	((type *)((char *)(pointer) - offsetof(type, member)))
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define barrier() asm volatile("" ::: "memory")
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))
#define ACCESS_ONCE(x) READ_ONCE(x)
#define rcu_dereference(pointer) READ_ONCE(pointer)
#define rcu_dereference_raw(pointer) READ_ONCE(pointer)
#define rcu_access_pointer(pointer) READ_ONCE(pointer)
#define BUILD_BUG_ON(condition) _Static_assert(!(condition), #condition)
#define min(a, b) \
	({ typeof(a) hm_a = (a); typeof(b) hm_b = (b); hm_a < hm_b ? hm_a : hm_b; })
#define max(a, b) \
	({ typeof(a) hm_a = (a); typeof(b) hm_b = (b); hm_a > hm_b ? hm_a : hm_b; })
#define min_t(type, a, b) min((type)(a), (type)(b))
#define max_t(type, a, b) max((type)(a), (type)(b))
#define clamp(value, low, high) min(max(value, low), high)
#define clamp_t(type, value, low, high) min_t(type, max_t(type, value, low), high)
#define min3(a, b, c) min(min(a, b), c)
#define max3(a, b, c) max(max(a, b), c)
#define swap(a, b) do { typeof(a) kept = (a); (a) = (b); (b) = kept; } while (0)
#define abs(x) ((x) < 0 ? -(x) : (x))
#define IS_ERR_VALUE(x) ((unsigned long)(x) >= (unsigned long)-MAX_ERRNO)
#define ERR_PTR(error) ((void *)(long)(error))
#define PTR_ERR(pointer) ((long)(pointer))
#define IS_ERR(pointer) IS_ERR_VALUE(pointer)
#define IS_ERR_OR_NULL(pointer) (!(pointer) || IS_ERR(pointer))

/* -- numbers */
#define BIT(n) (1UL << (n))
#define BIT_ULL(n) (1ULL << (n))
#define BIT_MASK(n) (1UL << ((n) % BITS_PER_LONG))
#define BIT_WORD(n) ((n) / BITS_PER_LONG)
#define BITS_TO_LONGS(n) DIV_ROUND_UP(n, BITS_PER_LONG)
#define GENMASK(high, low) (~0UL >> (BITS_PER_LONG - 1 - (high)) & ~0UL << (low))
#define GENMASK_ULL(high, low) (~0ULL >> (63 - (high)) & ~0ULL << (low))
#define upper_32_bits(n) ((u32)((u64)(n) >> 32))
#define lower_32_bits(n) ((u32)(n))
#define DIV_ROUND_UP(n, by) (((n) + (by) - 1) / (by))
#define DIV_ROUND_UP_ULL(n, by) DIV_ROUND_UP((unsigned long long)(n), by)
#define roundup(n, to) (DIV_ROUND_UP(n, to) * (to))
#define rounddown(n, to) ((n) - (n) % (to))
#define round_up(n, to) (((n) - 1 | (typeof(n))((to) - 1)) + 1)
#define round_down(n, to) ((n) & ~(typeof(n))((to) - 1))
#define ALIGN(n, to) (((n) + ((typeof(n))(to) - 1)) & ~((typeof(n))(to) - 1))
#define ALIGN_DOWN(n, to) ((n) & ~((typeof(n))(to) - 1))
#define PTR_ALIGN(pointer, to) ((typeof(pointer))ALIGN((unsigned long)(pointer), to))
#define IS_ALIGNED(n, to) (((n) & ((typeof(n))(to) - 1)) == 0)
#define PAGE_ALIGN(address) ALIGN(address, PAGE_SIZE)
#define do_div(n, by) ({ u32 over = (n) % (by); (n) /= (by); over; })
#define div_u64(n, by) ((u64)(n) / (u32)(by))
#define div64_u64(n, by) ((u64)(n) / (u64)(by))
#define div64_ul(n, by) ((u64)(n) / (unsigned long)(by))
#define mult_frac(n, times, by) ((n) / (by) * (times) + (n) % (by) * (times) / (by))
#define fls64(n) ((n) ? 64 - __builtin_clzll(n) : 0)
#define fls(n) ((n) ? 32 - __builtin_clz(n) : 0)
#define ilog2(n) (fls64(n) - 1)
#define is_power_of_2(n) ((n) != 0 && ((n) & ((n) - 1)) == 0)
#define test_bit(n, words) \
	((((const volatile unsigned long *)(words))[BIT_WORD(n)] & BIT_MASK(n)) != 0)

/* -- byte order: BCC's helpers.h, which comes later, has bpf_ntohs() and their like */
#define ___constant_swab16(n) ((__u16)((__u16)(n) << 8 | (__u16)(n) >> 8))
#define swab16(n) __builtin_bswap16(n)
#define swab32(n) __builtin_bswap32(n)
#define swab64(n) __builtin_bswap64(n)
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define __LITTLE_ENDIAN 1234
#define __LITTLE_ENDIAN_BITFIELD
#define HM_BIG(bits, n) __builtin_bswap##bits(n)
#define HM_LITTLE(bits, n) ((u##bits)(n))
#else
#define __BIG_ENDIAN 4321
#define __BIG_ENDIAN_BITFIELD
#define HM_BIG(bits, n) ((u##bits)(n))
#define HM_LITTLE(bits, n) __builtin_bswap##bits(n)
#endif
#define ntohs(n) HM_BIG(16, n)
#define htons(n) HM_BIG(16, n)
#define ntohl(n) HM_BIG(32, n)
#define htonl(n) HM_BIG(32, n)
#define __constant_ntohs(n) HM_BIG(16, n)
#define __constant_htons(n) HM_BIG(16, n)
#define __constant_ntohl(n) HM_BIG(32, n)
#define __constant_htonl(n) HM_BIG(32, n)
#define be16_to_cpu(n) HM_BIG(16, n)
#define be32_to_cpu(n) HM_BIG(32, n)
#define be64_to_cpu(n) HM_BIG(64, n)
#define cpu_to_be16(n) HM_BIG(16, n)
#define cpu_to_be32(n) HM_BIG(32, n)
#define cpu_to_be64(n) HM_BIG(64, n)
#define __be16_to_cpu(n) HM_BIG(16, n)
#define __be32_to_cpu(n) HM_BIG(32, n)
#define __be64_to_cpu(n) HM_BIG(64, n)
#define __cpu_to_be16(n) HM_BIG(16, n)
#define __cpu_to_be32(n) HM_BIG(32, n)
#define __cpu_to_be64(n) HM_BIG(64, n)
#define le16_to_cpu(n) HM_LITTLE(16, n)
#define le32_to_cpu(n) HM_LITTLE(32, n)
#define le64_to_cpu(n) HM_LITTLE(64, n)
#define cpu_to_le16(n) HM_LITTLE(16, n)
#define cpu_to_le32(n) HM_LITTLE(32, n)
#define cpu_to_le64(n) HM_LITTLE(64, n)

/* -- lists and trees: one step; BPF has no way to walk them all */
#define list_entry(pointer, type, member) container_of(pointer, type, member)
#define list_first_entry(head, type, member) list_entry((head)->next, type, member)
#define list_last_entry(head, type, member) list_entry((head)->prev, type, member)
#define list_next_entry(at, member) list_entry((at)->member.next, typeof(*(at)), member)
#define list_empty(head) (READ_ONCE((head)->next) == (head))
#define hlist_entry(pointer, type, member) container_of(pointer, type, member)
#define hlist_empty(head) (!READ_ONCE((head)->first))
#define rb_entry(pointer, type, member) container_of(pointer, type, member)

/* -- counters and times */
#define atomic_read(atomic) READ_ONCE((atomic)->counter)
#define atomic_long_read(atomic) READ_ONCE((atomic)->counter)
#define atomic64_read(atomic) READ_ONCE((atomic)->counter)
#define refcount_read(refcount) atomic_read(&(refcount)->refs)
#define kref_read(kref) refcount_read(&(kref)->refcount)
#define ktime_to_ns(time) ((s64)(time))
#define ktime_to_us(time) ((s64)(time) / NSEC_PER_USEC)
#define ktime_to_ms(time) ((s64)(time) / NSEC_PER_MSEC)
#define ns_to_ktime(ns) ((ktime_t)(ns))
#define ktime_sub(a, b) ((a) - (b))
#define ktime_add(a, b) ((a) + (b))

/* -- tasks */
#define task_pid_nr(task) ((task)->pid)
#define task_tgid_nr(task) ((task)->tgid)
#define thread_group_leader(task) ((task)->exit_signal >= 0)
#define task_thread_info(task) (&(task)->thread_info)
#define PRIO_TO_NICE(prio) ((prio) - DEFAULT_PRIO)
#define task_nice(task) PRIO_TO_NICE((task)->static_prio)

/* -- files and block devices */
#define MAJOR(dev) ((unsigned int)((dev) >> MINORBITS))
#define MINOR(dev) ((unsigned int)((dev) & MINORMASK))
#define MKDEV(major, minor) (((major) << MINORBITS) | (minor))
#define file_inode(file) ((file)->f_inode)
#define d_inode(dentry) ((dentry)->d_inode)
#define bio_op(bio) ((bio)->bi_opf & REQ_OP_MASK)
#define req_op(request) ((request)->cmd_flags & REQ_OP_MASK)
#define op_is_write(op) ((op) & 1)
#define bio_data_dir(bio) (op_is_write(bio_op(bio)) ? 1 : 0)
#define rq_data_dir(request) (op_is_write(req_op(request)) ? 1 : 0)
#define bio_sectors(bio) ((bio)->bi_iter.bi_size >> SECTOR_SHIFT)
#define blk_rq_pos(request) ((request)->__sector)
#define blk_rq_bytes(request) ((request)->__data_len)
#define blk_rq_sectors(request) (blk_rq_bytes(request) >> SECTOR_SHIFT)

/* -- lists of memory pieces: the low bits of a page's address are marks */
#define sg_is_chain(sg) ((sg)->page_link & 1)
#define sg_is_last(sg) ((sg)->page_link & 2)
#define sg_chain_ptr(sg) ((struct scatterlist *)((sg)->page_link & ~3UL))
#define sg_page(sg) ((struct page *)((sg)->page_link & ~3UL))

/* -- sockets: members of struct sock and of what begins with one (include/net/sock.h) */
#define sk_node __sk_common.skc_node
#define sk_nulls_node __sk_common.skc_nulls_node
#define sk_refcnt __sk_common.skc_refcnt
#define sk_tx_queue_mapping __sk_common.skc_tx_queue_mapping
#define sk_hash __sk_common.skc_hash
#define sk_portpair __sk_common.skc_portpair
#define sk_num __sk_common.skc_num
#define sk_dport __sk_common.skc_dport
#define sk_addrpair __sk_common.skc_addrpair
#define sk_daddr __sk_common.skc_daddr
#define sk_rcv_saddr __sk_common.skc_rcv_saddr
#define sk_family __sk_common.skc_family
#define sk_state __sk_common.skc_state
#define sk_reuse __sk_common.skc_reuse
#define sk_reuseport __sk_common.skc_reuseport
#define sk_ipv6only __sk_common.skc_ipv6only
#define sk_net_refcnt __sk_common.skc_net_refcnt
#define sk_bound_dev_if __sk_common.skc_bound_dev_if
#define sk_bind_node __sk_common.skc_bind_node
#define sk_prot __sk_common.skc_prot
#define sk_net __sk_common.skc_net
#define sk_v6_daddr __sk_common.skc_v6_daddr
#define sk_v6_rcv_saddr __sk_common.skc_v6_rcv_saddr
#define sk_cookie __sk_common.skc_cookie
#define sk_incoming_cpu __sk_common.skc_incoming_cpu
#define sk_flags __sk_common.skc_flags
#define inet_daddr sk.__sk_common.skc_daddr
#define inet_rcv_saddr sk.__sk_common.skc_rcv_saddr
#define inet_dport sk.__sk_common.skc_dport
#define inet_num sk.__sk_common.skc_num
#define ireq_num req.__req_common.skc_num
#define ir_num req.__req_common.skc_num
#define ir_loc_addr req.__req_common.skc_rcv_saddr
#define ir_rmt_addr req.__req_common.skc_daddr
#define ir_v6_rmt_addr req.__req_common.skc_v6_daddr
#define ir_v6_loc_addr req.__req_common.skc_v6_rcv_saddr
#define ir_rmt_port req.__req_common.skc_dport
#define ir_iif req.__req_common.skc_bound_dev_if
#define ireq_net req.__req_common.skc_net
#define ireq_state req.__req_common.skc_state
#define ireq_family req.__req_common.skc_family
#define tw_family __tw_common.skc_family
#define tw_state __tw_common.skc_state
#define tw_daddr __tw_common.skc_daddr
#define tw_rcv_saddr __tw_common.skc_rcv_saddr
#define tw_dport __tw_common.skc_dport
#define tw_num __tw_common.skc_num
#define s6_addr in6_u.u6_addr8
#define s6_addr16 in6_u.u6_addr16
#define s6_addr32 in6_u.u6_addr32
#define inet_sk(sock) ((struct inet_sock *)(sock))
#define inet_csk(sock) ((struct inet_connection_sock *)(sock))
#define inet_rsk(sock) ((struct inet_request_sock *)(sock))
#define inet_twsk(sock) ((struct inet_timewait_sock *)(sock))
#define tcp_sk(sock) ((struct tcp_sock *)(sock))
#define tcp_rsk(sock) ((struct tcp_request_sock *)(sock))
#define udp_sk(sock) ((struct udp_sock *)(sock))
#define raw_sk(sock) ((struct raw_sock *)(sock))
#define unix_sk(sock) ((struct unix_sock *)(sock))
#define sock_net(sock) ((sock)->sk_net.net)
#define SOCK_INODE(socket) \
	(&container_of(socket, struct socket_alloc, socket)->vfs_inode)
#define ipv6_addr_any(address) \
	(((address)->s6_addr32[0] | (address)->s6_addr32[1] | (address)->s6_addr32[2] | \
	  (address)->s6_addr32[3]) == 0)
#define ipv6_addr_v4mapped(address) \
	(((address)->s6_addr32[0] | (address)->s6_addr32[1] | \
	  ((address)->s6_addr32[2] ^ htonl(0xffff))) == 0)

/* -- packets */
#define skb_end_pointer(skb) ((skb)->head + (skb)->end)
#define skb_shinfo(skb) ((struct skb_shared_info *)skb_end_pointer(skb))
#define skb_mac_header(skb) ((skb)->head + (skb)->mac_header)
#define skb_network_header(skb) ((skb)->head + (skb)->network_header)
#define skb_transport_header(skb) ((skb)->head + (skb)->transport_header)
#define skb_inner_network_header(skb) ((skb)->head + (skb)->inner_network_header)
#define skb_inner_transport_header(skb) ((skb)->head + (skb)->inner_transport_header)
#define skb_headlen(skb) ((skb)->len - (skb)->data_len)
#define skb_is_nonlinear(skb) ((skb)->data_len)
#define skb_rx_queue_recorded(skb) ((skb)->queue_mapping != 0)
#define skb_get_rx_queue(skb) ((u16)((skb)->queue_mapping - 1))
#define skb_get_queue_mapping(skb) ((skb)->queue_mapping)
#define eth_hdr(skb) ((struct ethhdr *)skb_mac_header(skb))
#define ip_hdr(skb) ((struct iphdr *)skb_network_header(skb))
#define ipv6_hdr(skb) ((struct ipv6hdr *)skb_network_header(skb))
#define arp_hdr(skb) ((struct arphdr *)skb_network_header(skb))
#define tcp_hdr(skb) ((struct tcphdr *)skb_transport_header(skb))
#define udp_hdr(skb) ((struct udphdr *)skb_transport_header(skb))
#define icmp_hdr(skb) ((struct icmphdr *)skb_transport_header(skb))
#define TCP_SKB_CB(skb) ((struct tcp_skb_cb *)&(skb)->cb[0])
#define tcp_flag_byte(tcp) (((u8 *)(tcp))[13])

/* -- registers */
#if defined(__x86_64__)
#define user_mode(registers) (((registers)->cs & 3) != 0)
#define instruction_pointer(registers) ((registers)->ip)
#define user_stack_pointer(registers) ((registers)->sp)
#define regs_return_value(registers) ((registers)->ax)
#elif defined(__aarch64__)
#define user_mode(registers) (((registers)->pstate & 0xf) == 0)
#define instruction_pointer(registers) ((registers)->pc)
#define user_stack_pointer(registers) ((registers)->sp)
#define regs_return_value(registers) ((registers)->regs[0])
#endif

/* -- addresses (arch/x86/include/asm/page_64_types.h, arch/arm64/include/asm/memory.h) */
#if defined(__x86_64__)
#define __PAGE_OFFSET_BASE_L5 0xff11000000000000UL
#define __PAGE_OFFSET_BASE_L4 0xffff888000000000UL
#define __PAGE_OFFSET __PAGE_OFFSET_BASE_L4
#define __START_KERNEL_map 0xffffffff80000000UL
#define PAGE_OFFSET __PAGE_OFFSET
#elif defined(__aarch64__)
#ifdef CONFIG_ARM64_VA_BITS
#define PAGE_OFFSET (-(1UL << CONFIG_ARM64_VA_BITS))
#else
#define PAGE_OFFSET (-(1UL << 48))
#endif
#endif
