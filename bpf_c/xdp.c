/* xdp: counts packets and bytes of an interface by protocol and size, and by source or port if asked.
 *
 * Attaches to XDP, native or generic; always passes the packet.  Costs two array lookups a packet,
 * both inlined by the kernel and per CPU; BY_SOURCE and BY_PORT add a hash lookup.
 *
 * protocols   0-255: IPv4 by protocol, 256-511: IPv6 by protocol, 512: anything else
 * ethertypes  what is neither IPv4 nor IPv6, by Ethernet type; not with BY_SOURCE and BY_PORT
 * sizes       frame lengths: bucket n holds 2^n to 2^(n+1)-1 bytes
 * marks       packets that had: 0 a VLAN tag, 1 been a fragment, 2 been too short for their headers,
 *             3 not been counted by Ethernet type, 4 by source or port, because that map was full */
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

BPF_PERCPU_ARRAY(protocols, struct counter, OTHER + 1);
BPF_PERCPU_ARRAY(sizes, u64, SIZE_BUCKETS);
BPF_PERCPU_ARRAY(marks, u64, MARKS);
BPF_TABLE("percpu_hash", u32, struct counter, ethertypes, 1024);
#ifdef SAMPLED
BPF_PERCPU_ARRAY(sampling, struct sampling, 1);
#endif

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

/* How many packets this one stands for; 0 if it is to be passed over. */
static __always_inline u32 weigh_this(void)
{
#ifdef SAMPLED
	u32 zero = 0;
	return weigh(sampling.lookup(&zero));
#else
	return 1;
#endif
}

#define mark(which) add_mark(which, weight)
static __always_inline void add_mark(u32 which, u32 weight)
{
	u64 *count = marks.lookup(&which);
	if (count)
		*count += weight;
}

static __always_inline void add(struct counter *counter, u64 length, u32 weight)
{
	counter->packets += weight;
	counter->bytes += length * weight;
}

/* The same place in the packet, of which the verifier knows no more than that it is near enough: what it
 * has followed from here on for one way of getting here then stands for all others.  The farthest there
 * is: 22 + 40 + 6 * 2048 bytes. */
static __always_inline void *forget_way(void *place, void *data)
{
	u64 distance = place - data;
	asm volatile("%0 &= 0x3FFF" : "+r"(distance));
	return data + distance;
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

	u32 weight = weigh_this();
	if (!weight)
		return XDP_PASS;
	u32 bucket = log2_of(length);
	if (bucket >= SIZE_BUCKETS)
		bucket = SIZE_BUCKETS - 1;
	u64 *sized = sizes.lookup(&bucket);
	if (sized)
		*sized += weight;

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
		/* most packets */
	} else if (type < LOWEST_ETHERTYPE) {
		type = 0; /* a length: IEEE 802.3, all under one key */
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
			next = forget_way(next, data);
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
	struct counter *counter = protocols.lookup(&slot);
	if (counter)
		add(counter, length, weight);
	struct counter zero = {};
#if !defined(BY_SOURCE) && !defined(BY_PORT) /* whose rows do not tell it */
	if (slot == OTHER) {
		counter = ethertypes.lookup_or_try_init(&type, &zero);
		if (counter)
			add(counter, length, weight);
		else
			mark(ETHERTYPES_FULL);
	}
#endif
#if defined(BY_SOURCE) || defined(BY_PORT)
	counter = keys.lookup_or_try_init(&key, &zero);
	if (counter)
		add(counter, length, weight);
	else
		mark(KEYS_FULL);
#endif
	return XDP_PASS;
}
