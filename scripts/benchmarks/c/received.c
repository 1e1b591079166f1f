/* A tracepoint program as a user may write it: bytes received, by command. */
#include "hmebpf.h"

struct command {
	char comm[16];
};

BPF_TABLE("percpu_hash", struct command, u64, received, 4096);

int end_recv(struct sys_exit *ctx)
{
	struct command command = {};
	u64 none = 0;
	if (ctx->ret <= 0)
		return 0;
	bpf_get_current_comm(command.comm, sizeof(command.comm));
	u64 *bytes = received.lookup_or_try_init(&command, &none);
	if (bytes)
		*bytes += ctx->ret;
	return 0;
}
