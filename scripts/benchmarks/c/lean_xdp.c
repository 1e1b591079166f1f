/* The leanest xdp: it parses as bpf_c/xdp.c does, which tells why, and finds everything that it counts for
 * every packet in one value, by one lookup. */
#include "hmebpf.h"

#define IPV6_BASE 256
#define OTHER 512
#define LOWEST_ETHERTYPE 0x600
#define SIZE_BUCKETS 20
#define MAX_TAGS 2       /* 802.1ad carries one tag in another */
#define MAX_EXTENSIONS 6 /* RFC 8200 names each of five once, destination options twice */

enum mark { VLAN, FRAGMENT, TRUNCATED, ETHERTYPES_FULL, KEYS_FULL, MARKS };

struct counter {
	u64 packets;
	u64 bytes;
};

struct all {
	struct counter protocols[OTHER + 1];
	u64 sizes[SIZE_BUCKETS];
	u64 marks[MARKS];
};
BPF_PERCPU_ARRAY(counters, struct all, 1);
BPF_TABLE("percpu_hash", u32, struct counter, ethertypes, 1024);

#if defined(BY_SOURCE)
struct source {
	u32 is_ip;
	u32 address[4]; /* IPv4 as ::ffff:a.b.c.d */
};
BPF_TABLE("percpu_hash", struct source, struct counter, keys, KEYS);
#elif defined(BY_PORT)
struct port {
	u16 number; /* destination port, host byte order */
	u16 protocol;
};
BPF_TABLE("percpu_hash", struct port, struct counter, keys, KEYS);
#endif

#define mark(which) all->marks[which]++

static __always_inline void add(struct counter *counter, u64 length)
{
	counter->packets++;
	counter->bytes += length;
}

int count_packet(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data;
	void *end = (void *)(long)ctx->data_end;
	u64 length = end - data;
	struct eth_header *eth = data;
	void *next = eth + 1;
	u32 slot = OTHER;
	u32 type = 0;
	u8 protocol = 0;
	bool ports_follow = false;

	u32 bucket = log2_of(length);
	if (bucket >= SIZE_BUCKETS)
		bucket = SIZE_BUCKETS - 1;
	u32 zero_key = 0;
	struct all *all = counters.lookup(&zero_key);
	if (!all)
		return XDP_PASS;
	all->sizes[bucket]++;

#if defined(BY_SOURCE)
	struct source key = {};
#elif defined(BY_PORT)
	struct port key = {};
#endif

	if (next > end) {
		mark(TRUNCATED);
		goto count;
	}
	type = from_be16(eth->type);
	if (type == ETH_P_IP || type == ETH_P_IPV6) {
	} else if (type < LOWEST_ETHERTYPE) {
		type = 0;
	} else if (type == ETH_P_8021Q || type == ETH_P_8021AD) {
		mark(VLAN);
#pragma unroll
		for (int i = 0; i < MAX_TAGS; i++) {
			struct vlan_header *vlan = next;
			if (type != ETH_P_8021Q && type != ETH_P_8021AD)
				break;
			if ((void *)(vlan + 1) > end) {
				mark(TRUNCATED);
				goto count;
			}
			type = from_be16(vlan->type);
			next = vlan + 1;
		}
	}

	if (type == ETH_P_IP) {
		struct ipv4_header *ip = next;
		if ((void *)(ip + 1) > end) {
			mark(TRUNCATED);
			goto count;
		}
		protocol = ip->protocol;
		slot = protocol;
		u16 fragment = from_be16(ip->fragment);
		if (fragment & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS))
			mark(FRAGMENT);
		u32 header = (ip->version_and_words & 15) * 4;
		if (header < sizeof(*ip))
			header = sizeof(*ip);
		next += header;
		ports_follow = !(fragment & IPV4_FRAGMENT_OFFSET);
#if defined(BY_SOURCE)
		key.is_ip = 1;
		key.address[2] = 0xFFFF0000; /* bytes 00 00 ff ff */
		key.address[3] = ip->source;
#endif
	} else if (type == ETH_P_IPV6) {
		struct ipv6_header *ip = next;
		if ((void *)(ip + 1) > end) {
			mark(TRUNCATED);
			goto count;
		}
		protocol = ip->next;
		next = ip + 1;
		ports_follow = true;
#if defined(BY_SOURCE)
		key.is_ip = 1;
		__builtin_memcpy(key.address, ip->source, sizeof(key.address));
#endif
#pragma unroll
		for (int i = 0; i < MAX_EXTENSIONS; i++) {
			struct ipv6_extension *extension = next;
			if (protocol != IPPROTO_HOPOPTS && protocol != IPPROTO_ROUTING &&
			    protocol != IPPROTO_FRAGMENT && protocol != IPPROTO_AH &&
			    protocol != IPPROTO_DSTOPTS && protocol != IPPROTO_MH)
				break;
			if ((void *)(extension + 1) > end) {
				mark(TRUNCATED);
				ports_follow = false;
				break;
			}
			u8 kind = protocol;
			u32 words = extension->length;
			if (kind == IPPROTO_MH && extension->next == 59)
				break; /* mobility is what the packet is about, not on the way to it */
			protocol = extension->next;
			if (kind == IPPROTO_FRAGMENT) {
				u16 fragment = from_be16(extension->fragment);
				if (fragment & (IPV6_FRAGMENT_OFFSET | IPV6_MORE_FRAGMENTS))
					mark(FRAGMENT);
				if (fragment & IPV6_FRAGMENT_OFFSET) {
					ports_follow = false;
					break; /* what follows is the middle of something */
				}
				next += 8;
			} else if (kind == IPPROTO_AH) {
				next += (words + 2) * 4;
			} else {
				next += (words + 1) * 8;
			}
		}
		slot = IPV6_BASE + protocol;
	}

	/* Every protocol that has a header of its own starts with at least four bytes of it. */
	if (slot != OTHER && ports_follow && next + sizeof(struct ports) > end) {
		if (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP)
			mark(TRUNCATED);
		ports_follow = false;
	}
#if defined(BY_PORT)
	if (slot != OTHER && ports_follow &&
	    (protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP ||
	     protocol == IPPROTO_UDPLITE || protocol == IPPROTO_DCCP)) {
		struct ports *ports = next;
		if ((void *)(ports + 1) <= end) {
			key.number = from_be16(ports->destination);
			key.protocol = protocol;
		}
	}
#endif

count:;
	if (slot > OTHER)
		return XDP_PASS;
	struct counter *counter = &all->protocols[slot];
	add(counter, length);
	struct counter zero = {};
#if !defined(BY_SOURCE) && !defined(BY_PORT)
	if (slot == OTHER) {
		counter = ethertypes.lookup_or_try_init(&type, &zero);
		if (counter)
			add(counter, length);
		else
			mark(ETHERTYPES_FULL);
	}
#endif
#if defined(BY_SOURCE) || defined(BY_PORT)
	counter = keys.lookup_or_try_init(&key, &zero);
	if (counter)
		add(counter, length);
	else
		mark(KEYS_FULL);
#endif
	return XDP_PASS;
}
