/* What every program is compared with: nothing at all, and plain counters. */

BPF_PERCPU_ARRAY(by_cpu, u64, 1);
BPF_ARRAY(shared, u64, 1);

int pass(void *ctx)
{
	return XDP_PASS;
}

int count_by_cpu(void *ctx)
{
	u32 zero = 0;
	u64 *count = by_cpu.lookup(&zero);
	if (count)
		(*count)++;
	return XDP_PASS;
}

int count_atomically(void *ctx)
{
	u32 zero = 0;
	u64 *count = shared.lookup(&zero);
	if (count)
		__sync_fetch_and_add(count, 1);
	return XDP_PASS;
}

/* A tracing program returns 0: a perf event's own record is not wanted. */
int nothing(void *ctx)
{
	return 0;
}
