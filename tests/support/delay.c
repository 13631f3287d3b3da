/*
 * delay: a cable with a length, a rate and faults, between two Ethernet interfaces.
 *
 *     delay INTERFACE_A INTERFACE_B
 *
 * Every frame that arrives at one leaves at the other: late by a constant, serialized at a rate,
 * sometimes lost, doubled or overtaken. Each direction has its own settings and its own queue.
 * Commands are lines on standard input, answered by one line each on standard output:
 *
 *     set DIR KEY VALUE   -> "ok" or "error WHY"    DIR: ab, ba or both
 *     stats DIR           -> "KEY VALUE KEY VALUE ..."  DIR: ab or ba
 *
 * keys: delay_us    one way
 *       rate_kbit   0: unlimited; frames wait for each other as on a real line
 *       limit       frames that may wait, the rest is dropped (and counted)
 *       loss_ppm, duplicate_ppm, reorder_ppm   per million frames
 *       reorder_us  how much later than the others a reordered frame leaves
 *       seed        of the random numbers; the same seed and traffic give the same faults
 *       drop_next   lose that many frames from now on
 *
 * "ready" is the first line. End of standard input is the end of the program.
 *
 * Time: a frame's due time is fixed when it is read; ppoll(2) with a timer slack of 1 ns sleeps
 * until the earliest one. Frames are wire-sized with real checksums only where the hosts' offloads
 * are off (see delay.py).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 1 << 13, FRAME = 2048, BATCH = 64, LATE_SLOTS = 1 << 10, ROUNDS = 16 };

struct slot {
	uint64_t due;	/* ns, CLOCK_MONOTONIC */
	uint16_t length;
};

/* A ring of frames in the order in which they leave. */
struct queue {
	uint32_t size, head, count;
	struct slot *slots;
	unsigned char (*frames)[FRAME];
};

struct direction {
	int in, out;
	struct queue line, late;
	uint64_t delay, reorder;		/* ns */
	uint64_t rate, limit, loss, duplicate, reorder_ppm, drop_next;
	uint64_t random;
	uint64_t line_free;			/* when the last frame is through at this rate */
	uint64_t received, sent, lost, overflowed, doubled, reordered, failed, bytes;
	uint64_t lateness;			/* ns that frames left after they were due, summed */
};

static struct mmsghdr messages[BATCH];
static struct iovec vectors[BATCH];
static unsigned char inbox[BATCH][FRAME];

static void die(const char *what)
{
	printf("error %s: %s\n", what, strerror(errno));
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* xorshift64*: one chance in a million, as often as asked */
static bool chance(struct direction *d, uint64_t ppm)
{
	if (!ppm)
		return false;
	d->random ^= d->random >> 12;
	d->random ^= d->random << 25;
	d->random ^= d->random >> 27;
	return ((d->random * 2685821657736338717ULL) >> 33) % 1000000 < ppm;
}

static void *map(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	return memory;
}

static void queue_init(struct queue *q, uint32_t size)
{
	q->size = size;
	q->slots = map(size * sizeof(*q->slots));
	q->frames = map((size_t)size * FRAME);
}

static bool push(struct queue *q, uint64_t due, const unsigned char *frame, uint16_t length)
{
	uint32_t last = (q->head + q->count - 1) % q->size, slot = (q->head + q->count) % q->size;

	if (q->count == q->size)
		return false;
	if (q->count && q->slots[last].due > due)
		due = q->slots[last].due;	/* a delay made shorter does not reorder */
	q->slots[slot] = (struct slot){ due, length };
	memcpy(q->frames[slot], frame, length);
	q->count++;
	return true;
}

static void take(struct direction *d, uint64_t arrived, const unsigned char *frame, uint16_t length)
{
	uint64_t due;

	d->received++;
	if (d->drop_next) {
		d->drop_next--;
		d->lost++;
		return;
	}
	if (chance(d, d->loss)) {
		d->lost++;
		return;
	}
	if (d->line.count >= d->limit) {
		d->overflowed++;
		return;
	}
	if (d->line_free < arrived)
		d->line_free = arrived;
	if (d->rate)
		d->line_free += (uint64_t)length * 8000000 / d->rate;
	due = d->line_free + d->delay;
	if (chance(d, d->reorder_ppm) && push(&d->late, due + d->reorder, frame, length)) {
		d->reordered++;
		return;
	}
	if (!push(&d->line, due, frame, length))
		d->overflowed++;
	if (chance(d, d->duplicate) && push(&d->line, due, frame, length))
		d->doubled++;
}

/* Returns whether there may be more. */
static bool receive(struct direction *d)
{
	uint64_t arrived;
	int count;

	for (int i = 0; i < BATCH; i++)
		vectors[i] = (struct iovec){ inbox[i], FRAME };
	count = recvmmsg(d->in, messages, BATCH, MSG_DONTWAIT, NULL);
	if (count < 0) {
		if (errno == EAGAIN || errno == EINTR || errno == ENETDOWN)
			return false;
		die("recvmmsg");
	}
	arrived = now();
	for (int i = 0; i < count; i++) {
		if (messages[i].msg_hdr.msg_flags & MSG_TRUNC)
			d->failed++;	/* larger than the wire allows: an offload is on */
		else
			take(d, arrived, inbox[i], (uint16_t)messages[i].msg_len);
	}
	return count == BATCH;
}

/* What is due, in batches. Returns whether there may be more. */
static bool transmit(struct direction *d, struct queue *q, uint64_t time)
{
	uint32_t count = 0;
	int sent;

	while (count < q->count && count < BATCH) {
		uint32_t slot = (q->head + count) % q->size;

		if (q->slots[slot].due > time)
			break;
		vectors[count++] = (struct iovec){ q->frames[slot], q->slots[slot].length };
		d->lateness += time - q->slots[slot].due;
	}
	if (!count)
		return false;
	sent = sendmmsg(d->out, messages, count, MSG_DONTWAIT);
	if (sent < 0) {		/* the first frame: the other interface is down, or full */
		d->failed++;
		sent = 1;
	} else {
		d->sent += (uint64_t)sent;
		for (int i = 0; i < sent; i++)
			d->bytes += vectors[i].iov_len;
	}
	q->head = (q->head + (uint32_t)sent) % q->size;
	q->count -= (uint32_t)sent;
	return true;
}

static int open_interface(const char *name)
{
	int one = 1, size = 32 << 20;
	struct sockaddr_ll address = {
		.sll_family = AF_PACKET,
		.sll_protocol = htons(ETH_P_ALL),
		.sll_ifindex = (int)if_nametoindex(name),
	};
	struct packet_mreq promiscuous = {
		.mr_ifindex = address.sll_ifindex,
		.mr_type = PACKET_MR_PROMISC,
	};
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0 || !address.sll_ifindex)
		die(name);
	if (setsockopt(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_QDISC_BYPASS, &one, sizeof(one)) ||
	    setsockopt(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &promiscuous, sizeof(promiscuous)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) ||
	    bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die(name);
	return fd;
}

static bool set(struct direction *d, const char *key, uint64_t value)
{
	struct { const char *name; uint64_t *where; uint64_t factor; } keys[] = {
		{ "delay_us", &d->delay, 1000 },	{ "rate_kbit", &d->rate, 1 },
		{ "limit", &d->limit, 1 },		{ "loss_ppm", &d->loss, 1 },
		{ "duplicate_ppm", &d->duplicate, 1 },	{ "reorder_ppm", &d->reorder_ppm, 1 },
		{ "reorder_us", &d->reorder, 1000 },	{ "drop_next", &d->drop_next, 1 },
	};

	if (!strcmp(key, "seed")) {
		d->random = value * 2862933555777941757ULL + 3037000493ULL;
		return true;
	}
	for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); i++) {
		if (!strcmp(key, keys[i].name)) {
			*keys[i].where = value * keys[i].factor;
			return true;
		}
	}
	return false;
}

static void command(struct direction directions[2], const char *line)
{
	char where[8], key[32];
	unsigned long long value;
	bool ab, ba;

	if (sscanf(line, "set %7s %31s %llu", where, key, &value) == 3) {
		ab = !strcmp(where, "ab") || !strcmp(where, "both");
		ba = !strcmp(where, "ba") || !strcmp(where, "both");
		if ((!ab && !ba) || (ab && !set(&directions[0], key, value)) ||
		    (ba && !set(&directions[1], key, value)))
			printf("error no such direction or key: %s %s\n", where, key);
		else
			printf("ok\n");
	} else if (sscanf(line, "stats %7s", where) == 1) {
		struct direction *d = &directions[!strcmp(where, "ba")];

		printf("received %lu sent %lu lost %lu overflowed %lu doubled %lu reordered %lu "
		       "failed %lu bytes %lu lateness_ns %lu queued %u\n", d->received, d->sent, d->lost,
		       d->overflowed, d->doubled, d->reordered, d->failed, d->bytes, d->lateness,
		       d->line.count + d->late.count);
	} else {
		printf("error no such command: %s\n", line);
	}
}

static void read_commands(struct direction directions[2])
{
	static char text[4096];
	static size_t length;
	ssize_t got = read(STDIN_FILENO, text + length, sizeof(text) - length - 1);
	char *end;

	if (got <= 0)
		exit(0);
	length += (size_t)got;
	text[length] = 0;
	while ((end = strchr(text, '\n'))) {
		*end = 0;
		command(directions, text);
		length -= (size_t)(end + 1 - text);
		memmove(text, end + 1, length + 1);
	}
	if (length == sizeof(text) - 1)
		exit(1);
}

static uint64_t earliest(struct direction directions[2])
{
	uint64_t due = UINT64_MAX;

	for (int i = 0; i < 2; i++) {
		struct queue *queues[] = { &directions[i].line, &directions[i].late };

		for (int j = 0; j < 2; j++)
			if (queues[j]->count && queues[j]->slots[queues[j]->head].due < due)
				due = queues[j]->slots[queues[j]->head].due;
	}
	return due;
}

static bool forward(struct direction directions[2])
{
	bool more = false;

	for (int i = 0; i < 2; i++) {
		more |= receive(&directions[i]);
		more |= transmit(&directions[i], &directions[i].late, now());
		more |= transmit(&directions[i], &directions[i].line, now());
	}
	return more;
}

static void run(struct direction directions[2])
{
	struct pollfd polled[] = {
		{ STDIN_FILENO, POLLIN, 0 },
		{ directions[0].in, POLLIN, 0 },
		{ directions[1].in, POLLIN, 0 },
	};

	for (;;) {
		uint64_t due = earliest(directions), time = now(), left = due > time ? due - time : 0;
		struct timespec timeout = { (time_t)(left / 1000000000), (long)(left % 1000000000) };

		if (ppoll(polled, 3, due == UINT64_MAX ? NULL : &timeout, NULL) < 0 && errno != EINTR)
			die("ppoll");
		if (polled[0].revents)
			read_commands(directions);
		for (int i = 0; i < ROUNDS && forward(directions); i++)
			;
	}
}

int main(int argc, char **argv)
{
	static struct direction directions[2];

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (argc != 3) {
		printf("error usage: delay INTERFACE_A INTERFACE_B\n");
		return 2;
	}
	prctl(PR_SET_TIMERSLACK, 1);
	for (int i = 0; i < BATCH; i++)
		messages[i].msg_hdr = (struct msghdr){ .msg_iov = &vectors[i], .msg_iovlen = 1 };
	directions[0].in = directions[1].out = open_interface(argv[1]);
	directions[1].in = directions[0].out = open_interface(argv[2]);
	for (int i = 0; i < 2; i++) {
		queue_init(&directions[i].line, SLOTS);
		queue_init(&directions[i].late, LATE_SLOTS);
		set(&directions[i], "limit", SLOTS);
		set(&directions[i], "reorder_us", 1000);
		set(&directions[i], "seed", (uint64_t)i + 1);
	}
	printf("ready\n");
	run(directions);
}
