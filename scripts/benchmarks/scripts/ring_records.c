/* Records of one size, of many, and of one size of which every other one is discarded: made by
 * BPF_PROG_TEST_RUN, without wake-ups, to be drained by whoever is measured. */

struct record {
	u64 number;
	u32 pid;
	u32 length;
	char comm[16];
};

struct longer { /* begins as the other; BCC's event() knows no structures in structures */
	u64 number;
	u32 pid;
	u32 length;
	char comm[16];
	char rest[256];
};

BPF_RINGBUF_OUTPUT(events, 8192); /* pages: 32 MiB */
BPF_PERCPU_ARRAY(scratch, struct longer, 1);
BPF_ARRAY(numbers, u64, 1);

static __always_inline void fill(struct record *record)
{
	u32 zero = 0;
	u64 *number = numbers.lookup(&zero);
	record->number = number ? (*number)++ : 0;
	record->pid = 4711;
	record->length = 64;
	__builtin_memcpy(record->comm, "producer\0\0\0\0\0\0\0", 16);
}

int fixed(struct xdp_md *ctx)
{
	struct record *record = events.ringbuf_reserve(sizeof(*record));
	if (!record)
		return XDP_DROP;
	fill(record);
	events.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return XDP_PASS;
}

int half(struct xdp_md *ctx)
{
	struct record *record = events.ringbuf_reserve(sizeof(*record));
	if (!record)
		return XDP_DROP;
	fill(record);
	if (record->number & 1)
		events.ringbuf_discard(record, BPF_RB_NO_WAKEUP);
	else
		events.ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return XDP_PASS;
}

int mixed(struct xdp_md *ctx)
{
	u32 zero = 0;
	struct longer *longer = scratch.lookup(&zero);
	if (!longer)
		return XDP_DROP;
	fill((struct record *)longer);
	u64 size = sizeof(struct record) + (longer->number * 7 & 63);
	events.ringbuf_output(longer, size, BPF_RB_NO_WAKEUP);
	return XDP_PASS;
}
