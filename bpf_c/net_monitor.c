/* net-monitor: socket calls by process - connect, accept, send, receive, close - with bytes, errors
 * and latency.
 *
 * One of these is compiled, by the rung of the ladder that was taken:
 *   RUNG_TRACEPOINT      tracepoints syscalls:sys_enter_X and sys_exit_X, two for each system call
 *   RUNG_FENTRY          fentry and fexit on the system calls' functions
 *   RUNG_RAW_TRACEPOINT  raw tracepoints sys_enter and sys_exit, which every system call runs through
 * WITH_BTF adds what needs the kernel's structures: which descriptors are sockets, and so close; the
 * process's own name; both ends of a connection.
 *
 * A call is noted on entry, under the thread that makes it, and counted on return.  docs/net-monitor.md
 * gives the cost of each rung.  System calls of 32-bit programs are not counted on any. */
#include "hmebpf.h"

#define COMM_SIZE 16
#define SLOTS 32     /* of latencies: slot n counts 2^(n+7) to 2^(n+8)-1 ns, the first and last are open */
#define FIRST_SLOT 7 /* a system call of less than 128 ns would be news */
#define MAX_MESSAGES 1024 /* UIO_MAXIOV: the most that sendmmsg(2) takes at a time */
#ifndef PLACES
#define PLACES 32768
#endif
#ifndef ROWS
#define ROWS 4096
#endif

/* include/linux/socket.h */
#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define MSG_PEEK 0x2
#define MSG_ERRQUEUE 0x2000

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define FMODE_PATH (1 << 14) /* opened with O_PATH: a name, and no socket */

enum call { CONNECT, ACCEPT, SEND, RECV, CLOSE, CALLS };

enum rows_by { BY_PROCESS, BY_COMM, BY_CALL };

enum count { LOST, INFLIGHT_FULL, ROWS_FULL, ERRNOS_FULL, BYTES_UNKNOWN, COUNTS };

/* struct mmsghdr (include/linux/socket.h), of 64-bit programs. */
struct message {
	u64 header[7];
	u32 length;
	u32 unused;
};

/* Where they are read to, so many at a time; twice as long, for a number of which the verifier knows no
 * more than that it has one bit more. */
#define BLOCK 16
struct block {
	struct message messages[2 * BLOCK];
};

/* What the user asked for. */
struct choices {
	char comm[COMM_SIZE];
	u32 pid;
	u32 uid;
	u8 by_pid;
	u8 by_uid;
	u8 by_comm;
	u8 unused;
};

/* A call that has not returned yet. */
struct underway {
	u64 thread; /* that makes it; 0 if the place is free */
	u64 start_ns;
	u64 at;     /* in user space: the socket's address, or the array of messages */
	u64 length; /* of that address; where accept wants its length */
	u32 fd;
	u32 claims; /* on this place: how many calls are under way of threads that share it */
	u8 call;
	u8 bytes_are_news; /* not those that a peek or the error queue shows again */
	u16 weight;        /* how many calls it stands for */
};

struct process {
	u32 pid;
	u32 call;
	char comm[COMM_SIZE];
};

struct failure {
	u32 pid;
	u16 call;
	u16 number;
	char comm[COMM_SIZE];
};

struct counter {
	u64 calls;
	u64 errors;
	u64 bytes;
	u64 ns;
	u64 slots[SLOTS];
};

#define ADDRESS_SIZE 108 /* sun_path, the longest of them */
#define NO_FAMILY 0xFFFF

/* One end of a connection: 4 or 16 bytes, or a path as in sockaddr_un; no length where unknown. */
struct end {
	u16 port; /* host byte order */
	u16 length;
	char address[ADDRESS_SIZE];
};

struct event {
	u64 end_ns;
	u64 latency_ns;
	u64 weight;
	s32 ret;
	u32 pid;
	u32 uid;
	u16 family;
	u16 call;
	char comm[COMM_SIZE];
	struct end peer;
	struct end local;
};

#ifdef FILTERED
BPF_ARRAY(settings, struct choices, 1);
#endif
BPF_PERCPU_ARRAY(counts, u64, COUNTS);
BPF_PERCPU_ARRAY(calls, struct counter, CALLS);
/* All made in advance: before Linux 6.1 a tracing program must not allocate. */
BPF_TABLE("percpu_hash", struct process, struct counter, rows, ROWS);
BPF_TABLE("percpu_hash", struct failure, u64, failures, ROWS);
/* Calls under way: each in its thread's place, or, if that is taken by another thread, in the hash. */
BPF_ARRAY(places, struct underway, PLACES);
BPF_TABLE("hash", u64, struct underway, overflow, 16384);
BPF_PERCPU_ARRAY(blocks, struct block, 2); /* fexit of one call may be preempted by that of the other */
BPF_ARRAY(zeroes, struct counter, 1); /* what a row begins with; on the stack it would take half of that */
BPF_RINGBUF_OUTPUT(events, 256); /* pages: 1 MiB, some 3,000 events */
#ifdef SAMPLED
BPF_PERCPU_ARRAY(sampling, struct sampling, 1);
#define weight_of(underway) (underway)->weight
#else
#define weight_of(underway) 1
#endif

static __always_inline void count(u32 which)
{
	u64 *number = counts.lookup(&which);
	if (number)
		(*number)++;
}

/* How many calls this one stands for; 0 if it is to be passed over. */
static __always_inline u32 weigh_this(void)
{
#ifdef SAMPLED
	u32 zero = 0;
	return weigh(sampling.lookup(&zero));
#else
	return 1;
#endif
}

/* The process's name, as ps shows it, into zeroes; without BTF the calling thread's own.  As a string:
 * older kernels leave the rest of a longer name behind its end (5.10 does). */
static __always_inline void read_comm(char *comm)
{
#ifdef WITH_BTF
	u64 thread = bpf_get_current_pid_tgid();
	if (thread >> 32 != (u32)thread) {
		struct task_struct *task = (struct task_struct *)bpf_get_current_task(), *leader = NULL;
		bpf_probe_read_kernel(&leader, sizeof(leader), &task->group_leader);
		bpf_probe_read_kernel_str(comm, COMM_SIZE, &leader->comm);
		return;
	}
#endif
	bpf_get_current_comm(comm, COMM_SIZE);
}

#ifdef FILTERED
static __always_inline struct choices *find_choices(void)
{
	u32 zero = 0;
	return settings.lookup(&zero);
}

/* Is this thread one of a process and user that were asked for?  Decided before any work is done, on
 * entry and on return: neither changes during a call. */
static __always_inline bool wanted_thread(struct choices *choices)
{
	if (!choices)
		return false;
	if (choices->by_pid && choices->pid != bpf_get_current_pid_tgid() >> 32)
		return false;
	return !choices->by_uid || choices->uid == (u32)bpf_get_current_uid_gid();
}

/* And is its name?  On entry alone. */
static __always_inline bool wanted(struct choices *choices)
{
	if (!wanted_thread(choices))
		return false;
	if (choices->by_comm) {
		u64 comm[2] = {};
		read_comm((char *)comm);
		u64 *asked = (u64 *)choices->comm;
		if (comm[0] != asked[0] || comm[1] != asked[1])
			return false;
	}
	return true;
}
#else /* the user asked for none */
#define find_choices() NULL
#define wanted_thread(choices) true
#define wanted(choices) true
#endif

#ifdef WITH_BTF
/* The file behind a descriptor of the current process. */
static __always_inline struct file *find_file(u32 fd)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct files_struct *files = NULL;
	struct fdtable *table = NULL;
	struct file **slots = NULL, *file = NULL;
	u32 size = 0;
	bpf_probe_read_kernel(&files, sizeof(files), &task->files);
	bpf_probe_read_kernel(&table, sizeof(table), &files->fdt);
	bpf_probe_read_kernel(&size, sizeof(size), &table->max_fds);
	bpf_probe_read_kernel(&slots, sizeof(slots), &table->fd);
	if (fd < size)
		bpf_probe_read_kernel(&file, sizeof(file), slots + fd);
	return file;
}

static __always_inline bool is_socket(struct file *file)
{
	struct inode *inode = NULL;
	u16 mode = 0;
	u32 open_mode = 0;
	if (!file)
		return false;
	bpf_probe_read_kernel(&inode, sizeof(inode), &file->f_inode);
	bpf_probe_read_kernel(&mode, sizeof(mode), &inode->i_mode);
	if ((mode & S_IFMT) != S_IFSOCK)
		return false;
	bpf_probe_read_kernel(&open_mode, sizeof(open_mode), &file->f_mode);
	return !(open_mode & FMODE_PATH);
}
#endif

/* ---- calls under way ---------------------------------------------------------------------------
 *
 * Adding to a hash and deleting cost more than all the rest of a call.  So each thread has a place in an
 * array, by its number, which threads whose numbers are 32,768 apart share: the first that finds it free
 * takes it, the others go to the hash.  Whoever comes claims the place by an atomic addition, on a
 * cache line that no other CPU is using, and gives the claim back when the call returns; only he
 * who is alone with his claim may take the place.  (5.10 has additions alone: no result, no
 * exchange.)  That it is marked free, too, tells a CPU whose memory is weakly ordered that its last
 * holder has done with it: what is written there later cannot be overwritten by him.
 *
 * Neighbours are mostly threads of one process, on several CPUs: they get places far apart. */
static __always_inline struct underway *place_of(u64 thread)
{
	u32 index = (u32)thread * 0x9E35 % PLACES; /* odd: no two of 32,768 neighbours meet */
	return places.lookup(&index);
}

/* Whether the place is this thread's now. */
static __always_inline bool take(struct underway *place, u64 thread)
{
	if (place->thread == thread)
		return true; /* the return of its last call was missed */
	__sync_fetch_and_add(&place->claims, 1);
	return *(volatile u32 *)&place->claims == 1 && !*(volatile u64 *)&place->thread;
}

/* NULL for a call that was not wanted, or began before the monitor did. */
static __always_inline struct underway *find(u64 thread, struct underway *place)
{
	if (place->thread == thread)
		return place;
	return place->claims ? overflow.lookup(&thread) : NULL;
}

static __always_inline void forget(u64 thread, struct underway *place)
{
	if (place->thread == thread)
		*(volatile u64 *)&place->thread = 0;
	else
		overflow.delete(&thread);
	__sync_fetch_and_add(&place->claims, -1);
}

/* ---- entry ------------------------------------------------------------------------------------ */

static __always_inline void
describe(struct underway *underway, u32 call, u64 fd, u64 at, u64 length, u64 flags)
{
	underway->at = at;
	underway->length = length;
	underway->fd = fd;
	underway->call = call;
	underway->bytes_are_news = call == SEND || (call == RECV && !(flags & (MSG_PEEK | MSG_ERRQUEUE)));
	underway->start_ns = bpf_ktime_get_ns();
}

static __always_inline int enter(u32 call, u64 fd, u64 at, u64 length, u64 flags)
{
	struct choices *choices = find_choices();
	if (!wanted(choices))
		return 0;
	u64 thread = bpf_get_current_pid_tgid();
	struct underway *place = place_of(thread);
	if (!place)
		return 0;
	u32 weight = weigh_this();
	if (!weight) {
		/* What was left by a call that never returned must not be found when this one does. */
		if (find(thread, place))
			forget(thread, place);
		return 0;
	}
#ifdef WITH_BTF
	if (call == CLOSE && !is_socket(find_file(fd)))
		return 0;
#endif
	if (take(place, thread)) {
		describe(place, call, fd, at, length, flags);
		place->weight = weight;
		place->thread = thread;
		return 0;
	}
	struct underway underway = {};
	describe(&underway, call, fd, at, length, flags);
	underway.weight = weight;
	if (overflow.update(&thread, &underway)) {
		__sync_fetch_and_add(&place->claims, -1);
		count(INFLIGHT_FULL);
	}
	return 0;
}

/* ---- events ----------------------------------------------------------------------------------- */

/* An address as the caller passed it, or as the kernel has written it for accept. */
static __always_inline void read_sockaddr(struct event *event, u64 at, u64 length)
{
	u16 family = NO_FAMILY, port = 0;
	if (length < sizeof(family) || bpf_probe_read_user(&family, sizeof(family), (void *)at))
		return;
	event->family = family;
	if (family == AF_UNIX) {
		length -= sizeof(family);
		hide_from_clang(length);
		if (length > ADDRESS_SIZE)
			length = ADDRESS_SIZE;
		if (!bpf_probe_read_user(event->peer.address, length, (void *)at + 2))
			event->peer.length = length;
		return;
	}
	if ((family != AF_INET || length < 8) && (family != AF_INET6 || length < 24))
		return;
	bpf_probe_read_user(&port, sizeof(port), (void *)at + 2);
	event->peer.port = from_be16(port);
	if (family == AF_INET && !bpf_probe_read_user(event->peer.address, 4, (void *)at + 4))
		event->peer.length = 4;
	if (family == AF_INET6 && !bpf_probe_read_user(event->peer.address, 16, (void *)at + 8))
		event->peer.length = 16;
}

#ifdef WITH_BTF
static __always_inline void read_unix_end(struct end *end, struct unix_sock *unix_sock)
{
	struct unix_address *addr = NULL;
	u64 length = 0;
	bpf_probe_read_kernel(&addr, sizeof(addr), &unix_sock->addr);
	if (!addr)
		return; /* it was never bound */
	bpf_probe_read_kernel(&length, sizeof(addr->len), &addr->len);
	length -= sizeof(u16); /* sun_family */
	hide_from_clang(length);
	if (length > ADDRESS_SIZE)
		return;
	if (!bpf_probe_read_kernel(end->address, length, (void *)(addr + 1) + 2))
		end->length = length;
}

/* Both ends as the socket itself has them; only its own where it is listening. */
static __always_inline void read_socket(struct event *event, u32 fd, bool read_peer)
{
	struct file *file = find_file(fd);
	struct socket *socket = NULL;
	struct sock *sk = NULL;
	u16 family = 0, port = 0;
	if (!is_socket(file))
		return;
	bpf_probe_read_kernel(&socket, sizeof(socket), &file->private_data);
	bpf_probe_read_kernel(&sk, sizeof(sk), &socket->sk);
	if (!sk)
		return;
	bpf_probe_read_kernel(&family, sizeof(family), &sk->__sk_common.skc_family);
	event->family = family;
	if (family == AF_UNIX) {
		struct unix_sock *unix_sock = (struct unix_sock *)sk;
		struct sock *peer = NULL;
		read_unix_end(&event->local, unix_sock);
		bpf_probe_read_kernel(&peer, sizeof(peer), &unix_sock->peer);
		if (peer && read_peer)
			read_unix_end(&event->peer, (struct unix_sock *)peer);
		return;
	}
	if (family != AF_INET && family != AF_INET6)
		return;
	bpf_probe_read_kernel(&event->local.port, sizeof(u16), &sk->__sk_common.skc_num);
	if (read_peer) {
		bpf_probe_read_kernel(&port, sizeof(port), &sk->__sk_common.skc_dport);
		event->peer.port = from_be16(port);
	}
	struct sock_common *common = &sk->__sk_common;
	if (family == AF_INET) {
		event->local.length = 4;
		bpf_probe_read_kernel(event->local.address, 4, &common->skc_rcv_saddr);
		if (read_peer) {
			event->peer.length = 4;
			bpf_probe_read_kernel(event->peer.address, 4, &common->skc_daddr);
		}
	} else {
		event->local.length = 16;
		bpf_probe_read_kernel(event->local.address, 16, &common->skc_v6_rcv_saddr);
		if (read_peer) {
			event->peer.length = 16;
			bpf_probe_read_kernel(event->peer.address, 16, &common->skc_v6_daddr);
		}
	}
}
#endif

static __always_inline void
report(struct underway *underway, struct process *process, s64 ret, u64 end_ns)
{
	struct event *event = events.ringbuf_reserve(sizeof(struct event));
	if (!event) {
		count(LOST);
		return;
	}
	event->end_ns = end_ns;
	event->latency_ns = end_ns - underway->start_ns;
	event->weight = weight_of(underway);
	event->ret = ret;
	event->pid = bpf_get_current_pid_tgid() >> 32;
	event->uid = bpf_get_current_uid_gid();
	event->call = underway->call;
	event->family = NO_FAMILY;
	__builtin_memcpy(event->comm, process->comm, COMM_SIZE);
	event->peer.port = event->peer.length = 0;
	event->local.port = event->local.length = 0;
	bool accepted = underway->call == ACCEPT && ret >= 0;
#ifdef WITH_BTF
	read_socket(event, accepted ? ret : underway->fd, accepted);
	if (underway->call == CONNECT)
		read_sockaddr(event, underway->at, underway->length);
#else
	u64 length = underway->call == CONNECT ? underway->length : 0;
	if (accepted && underway->at)
		bpf_probe_read_user(&length, sizeof(u32), (void *)underway->length);
	read_sockaddr(event, underway->at, length);
#endif
	events.ringbuf_submit(event, 0);
}

/* ---- return ----------------------------------------------------------------------------------- */

/* How many bytes the messages had that sendmmsg or recvmmsg handled, sixteen at a time.
 *
 * The verifier walks through all rounds of the loop.  So that it does so once, nothing that it knows may
 * differ before the loop or after: how many are left is kept in the map, of whose contents it knows
 * nothing, and there is no branch but the one that ends it. */
static __always_inline u64 sum_messages(struct underway *underway, u64 number)
{
	u32 which = underway->call == SEND;
	struct block *block = blocks.lookup(&which);
	if (!block)
		return 0;
	volatile u64 *left = &underway->length;
	u64 at = underway->at, sum = 0, failures = 0;
	*left = number;
	for (u32 i = 0; i < MAX_MESSAGES / BLOCK && *left; i++) {
		u64 beyond = *left - BLOCK, is_last = (s64)beyond >> 63; /* all ones or zero */
		hide_from_clang(is_last);
		u64 taken = (BLOCK + (beyond & is_last)) & (2 * BLOCK - 1);
		u64 size = taken * sizeof(struct message);
#pragma unroll
		for (u32 j = 0; j < BLOCK; j++)
			block->messages[j].length = 0;
		failures |= bpf_probe_read_user(block, size, (void *)at);
#pragma unroll
		for (u32 j = 0; j < BLOCK; j++)
			sum += block->messages[j].length;
		*left -= taken;
		at += size;
	}
	if (failures || *left)
		count(BYTES_UNKNOWN);
	return sum;
}

/* What one call adds to a counter. */
struct outcome {
	u64 bytes;
	u64 ns;
	u64 slot;
	u64 failed; /* 1 or 0 */
	u64 weight;
};

static __always_inline void add(struct counter *counter, struct outcome *outcome)
{
	u64 slot = outcome->slot & (SLOTS - 1); /* as it is, but the verifier cannot tell */
	counter->calls += outcome->weight;
	counter->errors += outcome->failed * outcome->weight;
	counter->bytes += outcome->bytes * outcome->weight;
	counter->ns += outcome->ns * outcome->weight;
	counter->slots[slot] += outcome->weight;
}

static __always_inline void add_to_row(struct process *process, struct outcome *outcome)
{
	struct counter *row = rows.lookup(process);
	if (!row) {
		u32 first = 0;
		struct counter *zero = zeroes.lookup(&first);
		row = zero ? rows.lookup_or_try_init(process, zero) : NULL;
		if (!row) {
			count(ROWS_FULL);
			return;
		}
	}
	add(row, outcome);
}

static __always_inline void add_failure(struct process *process, u16 number, u64 weight)
{
	struct failure failure = {};
	u64 zero = 0;
	failure.pid = process->pid;
	failure.call = process->call;
	failure.number = number;
	__builtin_memcpy(failure.comm, process->comm, COMM_SIZE);
	u64 *times = failures.lookup_or_try_init(&failure, &zero);
	if (times)
		*times += weight;
	else
		count(ERRNOS_FULL);
}

/* `reports`: it may be a connect or accept, of which there are events; `many`: one of many messages. */
static __always_inline int leave(s64 ret, bool reports, bool many)
{
	struct choices *choices = find_choices();
	if (!wanted_thread(choices))
		return 0;
	u64 thread = bpf_get_current_pid_tgid();
	struct underway *place = place_of(thread);
	struct underway *underway = place ? find(thread, place) : NULL;
	if (!underway)
		return 0;
	u64 end_ns = bpf_ktime_get_ns();
	u32 call = underway->call;
	struct counter *counter = calls.lookup(&call);
	if (!counter)
		return 0;

	struct outcome outcome = {};
	outcome.weight = weight_of(underway);
	outcome.ns = end_ns - underway->start_ns;
	outcome.slot = log2_of(min_of(outcome.ns >> FIRST_SLOT, 0xFFFFFFFF));
	outcome.failed = (u64)ret >> 63;
	u16 error = outcome.failed ? -ret : 0; /* now: what a loop compared, the verifier keeps apart */
	if (ret > 0 && underway->bytes_are_news)
		outcome.bytes = many && underway->at ? sum_messages(underway, ret) : ret;
	add(counter, &outcome);

	struct process process = {};
	process.call = call;
	if (ROWS_BY != BY_CALL || EVENTS)
		read_comm(process.comm);
	if (reports && EVENTS && (call == CONNECT || call == ACCEPT))
		report(underway, &process, ret, end_ns);
	forget(thread, place);

	if (ROWS_BY == BY_PROCESS)
		process.pid = thread >> 32;
	if (ROWS_BY == BY_CALL)
		__builtin_memset(process.comm, 0, COMM_SIZE);
	else
		add_to_row(&process, &outcome);
	if (outcome.failed)
		add_failure(&process, error, outcome.weight);
	return 0;
}

/* ---- the rungs: thin programs around enter() and leave() ---------------------------------------- */

#ifdef RUNG_TRACEPOINT
typedef struct sys_enter entry;
typedef struct sys_exit result;
#define argument(n) ctx->args[n - 1]
#define read_arguments()
#define returned() ctx->ret
#else
/* From the registers with which user space made the call.  Their address is in the first word of the
 * context, read in this way because the verifier of Linux 5.10 refuses to load a fentry argument whose
 * type is declared only forward in the kernel's BTF. */
#define argument(n) SYSCALL_ARG##n(&user)
#define read_arguments() \
	void *registers = NULL; \
	struct pt_regs user; \
	bpf_probe_read_kernel(&registers, sizeof(registers), ctx); \
	if (bpf_probe_read_kernel(&user, sizeof(user), registers) || SYSCALL_IS_COMPAT(&user)) \
		return 0
#endif
#ifdef RUNG_FENTRY
typedef u64 entry, result; /* (registers); (registers, result) */
#define returned() (s64) ctx[1]
#endif
#ifdef RUNG_RAW_TRACEPOINT
typedef struct bpf_raw_tracepoint_args entry; /* sys_enter(registers, number) */
typedef struct bpf_raw_tracepoint_args result; /* sys_exit(registers, result) */
#define returned() ctx->args[1]
#endif

/* What each system call gives to enter(). */
#define CONNECT_ARGS CONNECT, argument(1), argument(2), (u32)argument(3), 0
#define ACCEPT_ARGS ACCEPT, argument(1), argument(2), argument(3), 0 /* and accept4 */
#define SEND_ARGS SEND, argument(1), 0, 0, 0 /* sendto and sendmsg */
#define SENDMMSG_ARGS SEND, argument(1), argument(2), 0, 0
#define RECVFROM_ARGS RECV, argument(1), 0, 0, argument(4)
#define RECVMSG_ARGS RECV, argument(1), 0, 0, argument(3)
#define RECVMMSG_ARGS RECV, argument(1), argument(2), 0, argument(4)
#define CLOSE_ARGS CLOSE, argument(1), 0, 0, 0

#ifndef RUNG_RAW_TRACEPOINT

int begin_connect(entry *ctx)
{
	read_arguments();
	return enter(CONNECT_ARGS);
}

int begin_accept(entry *ctx)
{
	read_arguments();
	return enter(ACCEPT_ARGS);
}

int begin_send(entry *ctx)
{
	read_arguments();
	return enter(SEND_ARGS);
}

int begin_sendmmsg(entry *ctx)
{
	read_arguments();
	return enter(SENDMMSG_ARGS);
}

int begin_recvfrom(entry *ctx)
{
	read_arguments();
	return enter(RECVFROM_ARGS);
}

int begin_recvmsg(entry *ctx)
{
	read_arguments();
	return enter(RECVMSG_ARGS);
}

int begin_recvmmsg(entry *ctx)
{
	read_arguments();
	return enter(RECVMMSG_ARGS);
}

#ifdef WITH_BTF
int begin_close(entry *ctx)
{
	read_arguments();
	return enter(CLOSE_ARGS);
}
#endif

int end_connection(result *ctx)
{
	return leave(returned(), true, false);
}

int end_call(result *ctx)
{
	return leave(returned(), false, false);
}

int end_messages(result *ctx)
{
	return leave(returned(), false, true);
}

#else

static __always_inline bool is_watched(u64 number)
{
	switch (number) {
#ifdef WITH_BTF
	case NR_CLOSE:
#endif
	case NR_CONNECT:
	case NR_ACCEPT:
	case NR_ACCEPT4:
	case NR_SENDTO:
	case NR_SENDMSG:
	case NR_SENDMMSG:
	case NR_RECVFROM:
	case NR_RECVMSG:
	case NR_RECVMMSG:
		return true;
	}
	return false;
}

int begin_any(entry *ctx)
{
	u64 number = ctx->args[1];
	if (!is_watched(number))
		return 0;
	read_arguments();
	switch (number) {
	case NR_CONNECT:
		return enter(CONNECT_ARGS);
	case NR_ACCEPT:
	case NR_ACCEPT4:
		return enter(ACCEPT_ARGS);
	case NR_SENDTO:
	case NR_SENDMSG:
		return enter(SEND_ARGS);
	case NR_SENDMMSG:
		return enter(SENDMMSG_ARGS);
	case NR_RECVFROM:
		return enter(RECVFROM_ARGS);
	case NR_RECVMSG:
		return enter(RECVMSG_ARGS);
	case NR_RECVMMSG:
		return enter(RECVMMSG_ARGS);
	}
	return enter(CLOSE_ARGS);
}

int end_any(result *ctx)
{
	struct pt_regs *user = (struct pt_regs *)ctx->args[0];
	u64 number = 0;
	bpf_probe_read_kernel(&number, sizeof(SYSCALL_NUMBER(user)), &SYSCALL_NUMBER(user));
	if (!is_watched(number))
		return 0;
	return leave(returned(), true, number == NR_SENDMMSG || number == NR_RECVMMSG);
}

#endif
