/* The handover between two daemons and the TCP sockets under them. docs/model.md says what is
 * modelled, what is left out and how to run it; names follow sessiond/core and sessiond/rebind.
 *
 * One process: each pass of its loop is one event at one host, taken whole, as Core.handle and the
 * engine take it. A tuple is two bits: which of the client's addresses, which of the server's.
 */

#ifndef FUEL
#define FUEL 2		/* disturbances before the network is calm */
#endif
#ifndef TICKS
#define TICKS 2		/* timers that fire early before that */
#endif
#ifndef ADDR0
#define ADDR0 3		/* the client's addresses, a bit each */
#endif
#ifndef ADDR1
#define ADDR1 1
#endif
#ifndef WRITES
#define WRITES 1	/* bytes each application writes before the calm; one more in it */
#endif
#ifndef ATTEMPTS
#define ATTEMPTS 2	/* REQUEST_ATTEMPTS */
#endif
#ifndef SLOTS
#define SLOTS 2		/* datagrams under way to one host */
#endif
#ifndef ROUNDS
#define ROUNDS 24	/* rounds of timers within which the calm must bring rest */
#endif
/* What may happen, if defined:
 *   LOSS DUP		datagrams and segments get lost; datagrams come twice (both come late anyway)
 *   OVERTAKING		a datagram may overtake a segment on its own path
 *   ADDRESSES BREAKS	hosts lose and gain addresses; paths stop working unnoticed
 *   REQUESTS		moves by request, with Prepare
 *   FAILS SETTLE_FAILS	engine steps fail, settle too; with ONE_FAILURE only one does
 *   GAP		a tombstone comes only after the socket has left
 *   CRASH DETACH	a daemon forgets everything; an application detaches its session
 * What counts as an error besides:
 *   RST_IS_ERROR	a connection killed by a RST
 *   CLOSE_COUNTS	an end that goes on for ever though the other end has its error
 * What the code might do and does not, see docs/model.md:
 *   OWN_RESULTS NEW_ORIGIN SHIELDED_RETREAT TOMBSTONE_AT_ORIGIN SHIELD_NOTED LEFT_BEFORE
 * Mutations, to see the model fail: NO_SHIELD NO_TOMBSTONE NO_SETTLED EQUAL_GENERATIONS
 */

#ifdef LOSS
#define LOSSY true
#else
#define LOSSY false
#endif

#define NONE 4
/* State */
#define PLAIN 0
#define ESTABLISHED 1
#define PREPARING 2
#define MOVING 3
#define FOLLOWING 4
#define WAITING 5
/* Guard */
#define OWN 0
#define SHIELD 1
#define LOCK 2
/* messages */
#define PREPARE 1
#define PREPARED 2
#define MOVE 3
#define MOVED 4
#define SETTLED 5
#define REFUSED 6
#define CLOSE 7
/* results of engine steps */
#define FAILED 1
#define RAISED 2
#define DEPARTED 3
#define ARRIVED 4
#define FOLLOWED 5
/* events */
#define E_MESSAGE 1
#define E_RESULT 2
#define E_TIMER 3
#define E_NETWORK 4
#define E_REQUEST 5
#define E_SEGMENT 6
#define E_SEND 7
#define E_PROBE 8
#define E_DETACH 9
#define E_CRASH 10
/* what a transition goes on with */
#define A_NONE 0
#define A_LEAVE 1
#define A_NEXT 2
#define A_DEPART 3
#define A_REQUEST 4
#define A_EXHAUSTED 5
#define A_REST 6
#define A_MOVED 7
#define A_ENGINE_ARRIVE 8
#define A_ENGINE_FOLLOW 9

typedef Host {
	/* the session (core/session.py) */
	unsigned st : 3;
	unsigned gen : 5;
	unsigned settled : 5;
	unsigned busy : 1;
	unsigned shielded : 1;
	unsigned departed : 1;
	unsigned forced : 1;
	unsigned target : 3;
	unsigned tuple : 2;
	unsigned plan : 4;	/* bit d: the tuple base ^ d is still to be tried */
	unsigned base : 2;
	unsigned r : 2;		/* rcv_nxt as told */
	unsigned pending : 1;
	unsigned attempts : 2;
	unsigned armed : 1;	/* has a deadline */
	unsigned due : 1;	/* in the calm: it passes in this round */
	unsigned crashed : 1;
	/* results not handled yet, oldest first */
	unsigned q0 : 11;
	unsigned q1 : 11;
	unsigned q2 : 11;
	/* the engine's notes (rebind/repair.py) */
	unsigned noted : 1;
	unsigned origin : 2;
	unsigned guard : 2;
	unsigned moved : 1;
	unsigned ntarget : 3;
	unsigned held : 3;	/* the tombstone, or in case 2 the reserved target */
	unsigned followed : 1;
	unsigned ftarget : 2;
	unsigned fra : 2;
	unsigned frb : 2;
	unsigned before : 2;	/* Notes.snd_nxt; 0 is none */
	/* the socket */
	unsigned alive : 1;
	unsigned tup : 2;
	unsigned open : 1;	/* its send window */
	unsigned una : 2;
	unsigned nxt : 2;
	unsigned written : 2;
	unsigned rcv : 2;
	unsigned resend : 1;	/* in the calm: TCP's timer passes in this round */
	/* the network */
	unsigned up : 2;
};

Host x[2];
short udp[4];		/* SLOTS to each host, the greatest first */
short tcp[2];		/* one segment under way to each host */
unsigned broken : 4;	/* tuples on which nothing gets through, though the hosts think so */
unsigned calm : 1;
unsigned rounds : 6;
unsigned fuel : 4;
unsigned ticks : 4;
unsigned failed : 1;	/* an engine step has */

#ifdef ONE_FAILURE
#define MAY_FAIL !failed
#else
#define MAY_FAIL true
#endif

/* of one event; zero between events */
byte h, event;
bool boom;		/* the engine step of this event fails */
bool gap;		/* depart: a segment arrives between leaving and the tombstone */
short m;

byte act, d, t, g, path, r, pd, kind, i, fine;
short v, out, sent;

#define me x[h]
#define USABLE(H, T) ((x[H].up >> (((T) >> (H)) & 1)) & 1)
#define PASSES(T) (!((broken >> (T)) & 1))
#define OWNBIT (1 << h)
#define FARBIT (2 >> h)
#define BUSY_NET (udp[0] || udp[1] || udp[2] || udp[3] || tcp[0] || tcp[1])
#define BUSY_HOST(H) (x[H].q0 || x[H].due || x[H].resend || \
	(x[H].alive && x[H].open && x[H].nxt < x[H].written))
#define QUIET (calm && !BUSY_NET && !BUSY_HOST(0) && !BUSY_HOST(1))
#define UNDELIVERED(H) (x[0].alive && x[1].alive && x[H].una < x[H].written)
#define ANY_TIMER (x[0].armed || x[1].armed || UNDELIVERED(0) || UNDELIVERED(1))

/* ---- the network ---- */

/* An event sends one datagram at most, and one segment. */
#define post(TYPE, GEN, PATH, R, PENDING) \
	out = (TYPE) | (GEN) << 3 | (PATH) << 8 | (R) << 10 | (PENDING) << 12
#define segment(T, SEQ, END, ACK, RST, PROBE) \
	sent = 1 | (T) << 1 | (SEQ) << 3 | (END) << 5 | (ACK) << 7 | (RST) << 9 | (PROBE) << 10

/* A datagram does not overtake a segment on its path unless OVERTAKING: bit 13, it is behind one. */
#ifdef OVERTAKING
#define BEHIND(H, PATH) 0
#else
#define BEHIND(H, PATH) ((tcp[H] && ((tcp[H] >> 1) & 3) == (PATH)) << 13)
#endif
#define PASSED(H) tcp[H] = 0; udp[2*H] = udp[2*H] & 8191; udp[2*H+1] = udp[2*H+1] & 8191
#define FREE(D) ((D) && !((D) >> 13 & 1))

#define to_udp udp[2 * (1 - h)]
#define and_udp udp[2 * (1 - h) + 1]

inline transmit() {	/* lost where there is no room: it may as well be lost on the way */
	if
	:: out && USABLE(h, (out >> 8) & 3) && PASSES((out >> 8) & 3) &&
	   (to_udp & 8191) != out && (and_udp & 8191) != out ->
		out = out | BEHIND(1 - h, (out >> 8) & 3);
		if
		:: to_udp == 0 -> to_udp = out
		:: to_udp && SLOTS > 1 && and_udp == 0 -> and_udp = out
		:: to_udp && SLOTS > 1 && and_udp && !LOSSY && (out & 7) == CLOSE -> and_udp = out
		:: else
		fi;
		if
		:: to_udp < and_udp -> v = to_udp; to_udp = and_udp; and_udp = v
		:: else
		fi
	:: else
	fi;
	if
	:: sent && tcp[1 - h] == 0 && USABLE(h, (sent >> 1) & 3) && PASSES((sent >> 1) & 3) ->
		tcp[1 - h] = sent
	:: else
	fi
}

inline receive() {
	t = (m >> 1) & 3;
	if
	:: !USABLE(h, t)
	:: USABLE(h, t) && me.alive && me.tup == t ->
		if
		:: me.guard == LOCK
		:: me.guard != LOCK && (m >> 9) & 1 ->	/* RST; RFC 5961: exactly in sequence */
			if
			:: me.guard == OWN && ((m >> 3) & 3) == me.rcv ->
#ifdef RST_IS_ERROR
				assert(false);
#endif
				died()
			:: else
			fi
		:: me.guard != LOCK && !((m >> 9) & 1) ->
			if
			:: (m >> 10) & 1 -> segment(t, me.nxt, me.nxt, me.rcv, 0, 0)
			:: !((m >> 10) & 1) && ((m >> 7) & 3) > me.nxt	/* tcp_ack(): not sent yet */
			:: else ->
				if :: ((m >> 7) & 3) > me.una -> me.una = (m >> 7) & 3 :: else fi;
				me.open = 1;
				if
				:: ((m >> 5) & 3) > ((m >> 3) & 3) ->
					if
					:: ((m >> 3) & 3) <= me.rcv && ((m >> 5) & 3) > me.rcv ->
						me.rcv = (m >> 5) & 3
					:: else
					fi;
					segment(t, me.nxt, me.nxt, me.rcv, 0, 0)
				:: else
				fi
			fi
		fi
	:: USABLE(h, t) && !(me.alive && me.tup == t) ->
		if
		:: me.held == t || (m >> 9) & 1
		:: else -> segment(t, (m >> 7) & 3, 0, 0, 1, 0)
		fi
	fi
}

inline died() {		/* the application has its error; the daemon hears of the end */
	me.alive = 0;
	ended()
}

inline ended() {	/* ending.py: remove; the engine's notes go with the connection */
	if
	:: me.st != PLAIN -> post(CLOSE, 0, me.tuple, 0, 0)
	:: else
	fi;
	me.st = PLAIN;
	forget()
}

inline forget() {
	me.busy = 0; me.shielded = 0; me.departed = 0; me.forced = 0; me.target = NONE;
	me.plan = 0; me.base = 0; me.r = 0; me.pending = 0; me.attempts = 0;
	me.armed = 0; me.due = 0; me.q0 = 0; me.q1 = 0; me.q2 = 0;
	forget_notes()	/* a filter stays on the socket */
}

inline forget_notes() {
	me.noted = 0; me.origin = 0; me.moved = 0; me.ntarget = NONE; me.held = NONE;
	me.followed = 0; me.ftarget = 0; me.fra = 0; me.frb = 0; me.before = 0
}

/* ---- the engine ---- */

#ifdef NO_SHIELD
#define SHIELDED OWN
#else
#define SHIELDED SHIELD
#endif

/* A segment, no RST, that the host would take for this tuple. */
#define FOR(S, T) ((S) && (((S) >> 1) & 3) == (T) && !((S) >> 9 & 1) && USABLE(h, T))

inline result(kind_, r_, pd_, t_) {
	v = kind_ | (r_) << 3 | (pd_) << 8 | (t_) << 9;
	if
	:: me.q0 == 0 -> me.q0 = v
	:: me.q0 != 0 && me.q1 == 0 -> me.q1 = v
	:: else -> assert(me.q2 == 0); me.q2 = v
	fi
}

inline fallible() {	/* fine = 0: this step is not taken */
	fine = 1;
	if
	:: boom -> boom = 0; fuel--; failed = 1; fine = 0
	:: else
	fi
}

inline note() {
	if
	:: !me.noted -> me.noted = 1; me.origin = me.tup
	:: else
	fi
}

inline dump() {		/* transmitted_to() */
	if
	:: me.before > me.nxt && me.before <= me.written -> me.nxt = me.before
	:: else
	fi
}

inline trim(R) {
	assert(R <= me.written);	/* else: the peer claims bytes never sent to it */
	if
	:: R >= me.una -> me.una = R; me.nxt = R
	:: else
	fi
}

inline move(T, guard_, open_, nxt_) {	/* Repair._move; nxt_: as dumped */
	if
#ifdef TOMBSTONE_AT_ORIGIN
	:: me.held == T || (me.held == me.ntarget && me.held != me.origin) -> me.held = NONE
#else
	:: me.ntarget != NONE || me.held == T -> me.held = NONE
#endif
	:: else
	fi;
	me.tup = T; me.guard = guard_; me.open = open_;
	me.moved = 1; me.ntarget = NONE;
	me.followed = 0; me.ftarget = 0; me.fra = 0; me.frb = 0;
	me.before = nxt_
}

inline end_handover() {	/* repair._end */
	if
	:: me.noted -> forget_notes(); me.guard = OWN
	:: else
	fi
}

/* _recover ends the handover of a socket that is where it was, behind its own filter. */
inline recover() {
	if
	:: me.noted && me.guard == OWN && !me.moved -> end_handover()
	:: else
	fi
}

inline engine_depart(T) {
	fallible();
	if
	:: !fine || !USABLE(h, T) -> recover(); result(FAILED, 0, 0, 0)
	:: else ->
		note();
		dump();
		if
		:: T == me.tup ->
			me.open = 0; me.guard = LOCK; me.moved = 1; me.ntarget = T;
			result(DEPARTED, me.rcv, 1, T)
		:: T != me.tup && me.una < me.nxt ->
			me.held = T;	/* _reserve lets go of what was held */
			me.guard = LOCK; me.ntarget = T;
			result(DEPARTED, me.rcv, 1, T)
		:: else ->
			path = me.tup;
			move(T, SHIELDED, 0, me.nxt);
			if
			:: gap && FOR(tcp[h], path) ->	/* a segment comes before the tombstone */
				segment(path, (tcp[h] >> 7) & 3, 0, 0, 1, 0);
				PASSED(h)
			:: else
			fi;
#ifndef NO_TOMBSTONE
			if
#ifdef TOMBSTONE_AT_ORIGIN
			:: T == me.origin -> me.held = NONE
			:: T != me.origin -> me.held = me.origin
#else
			:: me.held == NONE -> me.held = path
			:: else
#endif
			fi;
#endif
			result(DEPARTED, me.rcv, 0, T)
		fi
	fi
}

inline engine_arrive(R) {
	if
	:: !me.noted || (me.ntarget == NONE && (!me.moved || me.open)) ->
		end_handover(); result(ARRIVED, 0, 0, 0)
	:: else ->
		fallible();
		if
		:: !fine -> recover(); result(FAILED, 0, 0, 0)
		:: else ->
			if
			:: me.ntarget == NONE -> me.open = 1
			:: else ->
				dump();
				d = me.nxt;
				trim(R);
				move(me.ntarget, OWN, 1, d)
			fi;
			end_handover();
			result(ARRIVED, 0, 0, 0)
		fi
	fi
}

inline engine_follow(T, R, hold) {
	note();
	if
	:: me.followed && me.ftarget == T && me.fra == R -> result(FOLLOWED, me.frb, 0, 0)
	:: else ->
		fallible();
		if
		:: !fine -> recover(); result(FAILED, 0, 0, 0)
		:: else ->
			dump();
			d = me.nxt;
			trim(R);
			move(T, SHIELDED, !(hold), d);
			me.followed = 1; me.ftarget = T; me.fra = R; me.frb = me.rcv;
#ifdef NEW_ORIGIN
			me.origin = T;
#endif
			result(FOLLOWED, me.rcv, 0, 0)
		fi
	fi
}

inline engine_settle() {
	if
	:: !me.noted || (me.ntarget == NONE && (!me.moved || me.open)) -> end_handover()
	:: else ->
#ifdef SETTLE_FAILS
		fallible();
#else
		fine = 1;
#endif
		if
		:: !fine -> recover(); result(FAILED, 0, 1, 0)
		:: else -> me.open = 1; end_handover()
		fi
	fi
}

inline engine_retreat() {
	if
	:: !me.noted || !me.moved -> stay()
	:: else ->
		fallible();
		if
		:: !fine -> recover(); result(FAILED, 0, 1, 0)
		:: else ->
			if
			:: me.tup == me.origin -> me.open = 1
			:: else ->
				dump();
				move(me.origin, OWN, 1, me.nxt)
			fi;
			stay()
		fi
	fi
}

inline stay() {
#ifdef SHIELDED_RETREAT
	if
	:: me.noted ->
		me.guard = SHIELDED; me.held = NONE; me.ntarget = NONE; me.shielded = 1
	:: else
	fi
#else
	end_handover()
#endif
}

inline engine_shield(g_, path_) {
	fallible();
	if
	:: !fine -> recover(); result(FAILED, 0, 1, 0)
	:: else ->
		note();
		if :: me.guard == OWN -> me.guard = SHIELDED :: else fi;
		result(RAISED, g_, 0, path_)
	fi
}

/* ---- the core ---- */

inline deadline(on) { me.armed = on; me.due = 0 }

inline make_plan(base_) {	/* every path from an address that is there */
	me.base = base_; me.plan = 0;
	i = 0;
	do
	:: i < 4 ->
		t = (base_) ^ i;
		if
		:: USABLE(h, t) && (((h -> ADDR0 : ADDR1) >> ((t >> (1 - h)) & 1)) & 1) ->
			me.plan = me.plan | (1 << i)
		:: else
		fi;
		i++
	:: else -> break
	od
}

inline pop() {		/* rather the same tuple, then the peer's same address */
	if
	:: me.plan & 1 -> d = 0
	:: !(me.plan & 1) && (me.plan >> OWNBIT) & 1 -> d = OWNBIT
	:: !(me.plan & 1) && !((me.plan >> OWNBIT) & 1) && (me.plan >> FARBIT) & 1 -> d = FARBIT
	:: else -> d = 3
	fi;
	me.plan = me.plan & ~(1 << d);
	me.target = me.base ^ d
}

inline finish() {
	me.tuple = me.target; me.departed = 0; me.shielded = 0
}

#ifdef NO_SETTLED
#define SEND_SETTLED skip
#else
#define SEND_SETTLED post(SETTLED, me.settled, me.tuple, 0, 0)
#endif

inline peer_closed() {
	if
	:: me.departed || me.shielded || me.st == FOLLOWING -> engine_settle()
	:: else
	fi;
	me.departed = 0; me.shielded = 0;
	me.st = PLAIN;
	deadline(0)
}

inline on_message() {
	kind = m & 7; g = (m >> 3) & 31; path = (m >> 8) & 3; r = (m >> 10) & 3; pd = (m >> 12) & 1;
	if
	:: me.st == PLAIN || (me.busy && kind != CLOSE)
	:: me.st != PLAIN && kind == CLOSE -> peer_closed()
	:: else ->
		if
		:: kind == PREPARE ->
#ifdef SHIELD_NOTED
			me.shielded = 1;
#endif
			engine_shield(g, path)
		:: kind == PREPARED ->
			if :: me.st == PREPARING && g == me.gen -> act = A_DEPART :: else fi
		:: kind == REFUSED ->
			if
			:: (me.st == PREPARING || me.st == MOVING) && g == me.gen -> act = A_NEXT
			:: else
			fi
		:: kind == SETTLED ->
			if
			:: me.st == FOLLOWING && g == me.gen ->
				deadline(0);
				engine_settle();
#ifdef SHIELD_NOTED
				if :: me.shielded -> note(); me.guard = SHIELDED :: else fi;
#endif
				act = A_REST
			:: else
			fi
		:: kind == MOVED ->
			if
			:: me.st == MOVING ->
				if
				:: g == me.gen && me.departed -> deadline(0); act = A_ENGINE_ARRIVE
				:: else
				fi
			:: me.st == FOLLOWING
			:: else ->	/* settle_again */
				if
				:: g == me.settled -> SEND_SETTLED
				:: g > me.settled -> act = A_LEAVE
				:: else
				fi
			fi
		:: kind == MOVE -> on_move()
		fi
	fi
}

#ifdef EQUAL_GENERATIONS
#define PRECEDES (g >= me.gen)
#else
#define PRECEDES (g > me.gen || (g == me.gen && \
	(me.st == PREPARING || (me.st == MOVING && h != 0))))
#endif

inline on_move() {
	if
	:: g == me.gen && me.st == FOLLOWING -> act = A_MOVED
	:: !(g == me.gen && me.st == FOLLOWING) && !PRECEDES
	:: else ->
		deadline(0);
		me.gen = g;
		if
		:: !USABLE(h, path) ->
			me.forced = 1;
			make_plan((me.tuple & OWNBIT) | (path & FARBIT));
			act = A_NEXT
		:: else ->
			me.st = FOLLOWING; me.target = path; me.attempts = 0;
			act = A_ENGINE_FOLLOW
		fi
	fi
}

inline on_result() {
	kind = me.q0 & 7; r = (me.q0 >> 3) & 31; pd = (me.q0 >> 8) & 1; t = (me.q0 >> 9) & 3;
	me.q0 = me.q1; me.q1 = me.q2; me.q2 = 0;
	if
	:: kind == RAISED ->
		if
		:: me.st == PLAIN
		:: me.busy && me.st != PLAIN
		:: else ->
			me.shielded = 1;
			post(PREPARED, r, t, 0, 0);
			if :: me.st == ESTABLISHED -> deadline(1) :: else fi
		fi
#ifdef OWN_RESULTS
	:: kind == FAILED && pd ->
		if :: me.st == ESTABLISHED && me.shielded -> deadline(1) :: else fi
#endif
	:: else ->
		me.busy = 0;
		if
		:: me.st == PLAIN
		:: me.st == MOVING && kind == FAILED -> act = A_NEXT
		:: me.st == FOLLOWING && kind == FAILED ->
			post(REFUSED, me.gen, me.target, 0, 0);
#ifdef LEFT_BEFORE
			act = (me.departed -> A_LEAVE : A_REST)
#else
			act = A_REST
#endif
		:: kind == FAILED && me.st != PLAIN && me.st != MOVING && me.st != FOLLOWING
		:: me.st == MOVING && kind == DEPARTED ->
			me.departed = 1; me.target = t; me.r = r; me.pending = pd;
			act = A_REQUEST
		:: me.st == MOVING && kind == ARRIVED ->
			finish();
			me.settled = me.gen;
			SEND_SETTLED;
			act = A_REST
		:: me.st == FOLLOWING && kind == FOLLOWED ->
			me.r = r;
			finish();
			act = A_MOVED
		:: else -> assert(false)	/* LookupError: no row */
		fi
	fi
}

inline on_timer() {
	deadline(0);
	if
	:: me.busy || me.st == PLAIN
	:: else ->
		if
		:: me.st == ESTABLISHED ->
			if
			:: me.shielded -> me.shielded = 0; engine_settle()
			:: else
			fi
		:: me.st == PREPARING || me.st == MOVING ->
			if
			:: me.attempts < ATTEMPTS -> act = A_REQUEST
			:: else -> act = A_NEXT
			fi
		:: me.st == FOLLOWING -> act = A_MOVED
		:: me.st == WAITING -> act = A_LEAVE
		fi
	fi
}

inline on_network() {
	if
	:: me.busy || me.st == PLAIN
	:: else ->
		if
		:: me.st == MOVING ->
			if
			:: me.target == NONE || !USABLE(h, me.target) -> act = A_LEAVE
			:: else
			fi
		:: me.st == WAITING || !USABLE(h, me.tuple) -> act = A_LEAVE
		:: else
		fi
	fi
}

inline on_request() {
	make_plan(me.tuple);
	me.plan = me.plan & ~1;
	if
	:: me.plan -> me.forced = 0; act = A_NEXT
	:: else
	fi
}

#define SOCKET(H) x[H].tup, x[H].guard, x[H].open, x[H].una, x[H].nxt, x[H].written, x[H].rcv
#define SESSION(H) x[H].st, x[H].gen, x[H].tuple, x[H].held, x[H].up

inline tell() {		/* for the reader of a trail; tests/model/trail.py makes words of it */
	printf("@ %d %d %d %d %d", h, event, m, out, sent);
	printf(" | %d %d %d %d %d", SESSION(0));
	printf(" %d %d %d %d %d %d %d", SOCKET(0));
	printf(" | %d %d %d %d %d", SESSION(1));
	printf(" %d %d %d %d %d %d %d", SOCKET(1));
	printf(" | %d %d\n", calm, rounds)
}

inline clear() {
	event = 0; h = 0; m = 0; boom = 0; gap = 0; act = 0; d = 0; t = 0; g = 0; path = 0; r = 0;
	pd = 0; kind = 0; i = 0; fine = 0; v = 0; out = 0; sent = 0
}

inline go_on() {
	do
	:: act == A_NONE -> break
	:: act == A_LEAVE ->
		me.forced = 1;
		make_plan(me.tuple);
		act = A_NEXT
	:: act == A_NEXT ->
		deadline(0);
		if
		:: me.plan == 0 -> act = A_EXHAUSTED
		:: else ->
			pop();
			assert(me.gen < 31);
			me.gen++;
			me.attempts = 0;
			if
			:: me.forced -> act = A_DEPART
			:: else -> me.st = PREPARING; act = A_REQUEST
			fi
		fi
	:: act == A_DEPART ->
		me.st = MOVING; me.attempts = 0;
		deadline(0);
		me.busy = 1;
		engine_depart(me.target);
		act = A_NONE
	:: act == A_REQUEST ->
		if
		:: me.st == PREPARING -> post(PREPARE, me.gen, me.target, 0, 0)
		:: else -> post(MOVE, me.gen, me.target, me.r, me.pending)
		fi;
		deadline(1);
		me.attempts++;
		act = A_NONE
	:: act == A_EXHAUSTED ->
		if
		:: !me.forced && !me.departed -> me.target = NONE; act = A_REST
		:: !me.forced && me.departed ->
			me.forced = 1; me.base = me.tuple; me.plan = 1; act = A_NEXT
		:: else ->
			me.st = WAITING;
			if
			:: me.departed && USABLE(h, me.tuple) -> me.departed = 0; engine_retreat()
			:: else
			fi;
			me.armed = (me.up != 0);
			act = A_NONE
		fi
	:: act == A_REST ->
		me.st = ESTABLISHED; me.plan = 0; me.attempts = 0;
		if :: me.shielded -> deadline(1) :: else fi;
		act = A_NONE;
		if :: !USABLE(h, me.tuple) -> act = A_LEAVE :: else fi
	:: act == A_MOVED ->
		post(MOVED, me.gen, me.tuple, me.r, 0);
		deadline(1);
		act = A_NONE
	:: act == A_ENGINE_ARRIVE -> me.busy = 1; engine_arrive(r); act = A_NONE
	:: act == A_ENGINE_FOLLOW -> me.busy = 1; engine_follow(path, r, pd); act = A_NONE
	od
}

/* ---- what must hold ---- */

inline always() {
	/* what is acknowledged or trimmed has been received, and received was only what was written */
	assert(x[0].una <= x[1].rcv && x[1].una <= x[0].rcv);
	assert(x[0].rcv <= x[1].written && x[1].rcv <= x[0].written);
	assert(!(x[0].alive && x[0].held == x[0].tup));
	assert(!(x[1].alive && x[1].held == x[1].tup))
}

#define WHOLE(H) (x[H].guard == OWN && x[H].open && !x[H].noted && x[H].held == NONE)
#define RESTING(H) (x[H].st == PLAIN || \
	(x[H].st == ESTABLISHED && x[H].tuple == x[H].tup && !x[H].shielded && !x[H].departed))

inline at_rest() {
	if
	:: x[0].alive && x[1].alive && !x[0].crashed && !x[1].crashed ->
		assert(WHOLE(0) && WHOLE(1));
		assert(x[0].tup == x[1].tup);
		assert(RESTING(0) && RESTING(1));
		assert(x[0].rcv == x[1].written && x[1].rcv == x[0].written)
	:: else		/* an application has its error, or a daemon has forgotten all */
	fi
}

#define LOSES (LOSSY && !calm)

#define HAPPENS(H)							\
	:: FREE(udp[2*H]) && !x[H].q1 -> h = H; event = E_MESSAGE; m = udp[2*H];		\
		udp[2*H] = udp[2*H+1]; udp[2*H+1] = 0;			\
	:: FREE(udp[2*H+1]) && !x[H].q1 -> h = H; event = E_MESSAGE; m = udp[2*H+1]; udp[2*H+1] = 0;	\
	:: LOSES && udp[2*H] -> udp[2*H] = udp[2*H+1]; udp[2*H+1] = 0;	\
	:: LOSES && udp[2*H+1] -> udp[2*H+1] = 0;			\
	:: x[H].q0 -> h = H; event = E_RESULT;				\
	:: !x[H].q0 && x[H].due -> h = H; event = E_TIMER;		\
	:: !calm && !x[H].q0 && x[H].armed && ticks > 0 -> ticks--; h = H; event = E_TIMER;	\
	:: tcp[H] -> h = H; event = E_SEGMENT; m = tcp[H]; PASSED(H);	\
	:: LOSES && tcp[H] -> PASSED(H);				\
	:: !calm && x[H].alive && x[H].written < WRITES -> x[H].written++;	\
	:: x[H].alive && x[H].una < x[H].written && tcp[1-H] == 0 &&	\
	   (!calm || x[H].resend || (x[H].open && x[H].nxt < x[H].written)) ->	\
		x[H].resend = 0; h = H; event = (x[H].open -> E_SEND : E_PROBE);	\
	:: calm && x[H].resend && !(x[H].alive && x[H].una < x[H].written) -> x[H].resend = 0;

#define DUPLICATED(H)	\
	:: !calm && fuel > 0 && !x[H].q1 && FREE(udp[2*H]) -> fuel--; h = H; event = E_MESSAGE; m = udp[2*H];	\
	:: !calm && fuel > 0 && !x[H].q1 && FREE(udp[2*H+1]) -> fuel--; h = H; event = E_MESSAGE; m = udp[2*H+1];

#define ADDRESS(H, A, ALL)	\
	:: !calm && fuel > 0 && ((ALL) & (A)) && (x[H].up & (A)) ->	\
		fuel--; x[H].up = x[H].up ^ (A); h = H; event = E_NETWORK;	\
	:: !calm && (fuel > 0 || x[H].up == 0) && ((ALL) & (A)) && !(x[H].up & (A)) ->	\
		fuel = fuel - (x[H].up -> 1 : 0); x[H].up = x[H].up ^ (A); h = H; event = E_NETWORK;

#define BREAK(T)	\
	:: !calm && fuel > 0 -> fuel--; broken = broken ^ (1 << T);

#define ONE(H, WHAT, GUARD) :: !calm && fuel > 0 && (GUARD) -> fuel--; h = H; event = WHAT;

/* Where one application has its error the other's is TCP's affair, and Close may have got lost. */
#if defined(CLOSE_COUNTS)
#define OVER false
#elif defined(CRASH)
#define OVER (x[0].crashed || x[1].crashed || !x[0].alive || !x[1].alive)
#else
#define OVER (!x[0].alive || !x[1].alive)
#endif

active proctype world() {
	d_step {
		x[0].st = ESTABLISHED; x[0].target = NONE; x[0].ntarget = NONE; x[0].held = NONE;
		x[1].st = ESTABLISHED; x[1].target = NONE; x[1].ntarget = NONE; x[1].held = NONE;
		x[0].alive = 1; x[0].open = 1; x[0].up = ADDR0;
		x[1].alive = 1; x[1].open = 1; x[1].up = ADDR1;
		fuel = FUEL; ticks = TICKS
	}
	do
	:: QUIET && !ANY_TIMER -> break
	:: QUIET && OVER -> break
	:: atomic {
		if
		HAPPENS(0)
		HAPPENS(1)
#ifdef DUP
		DUPLICATED(0)
		DUPLICATED(1)
#endif
#ifdef ADDRESSES
		ADDRESS(0, 1, ADDR0)
		ADDRESS(0, 2, ADDR0)
		ADDRESS(1, 1, ADDR1)
		ADDRESS(1, 2, ADDR1)
#endif
#ifdef BREAKS
		BREAK(0)
		BREAK(1)
#endif
#ifdef REQUESTS
		ONE(0, E_REQUEST, x[0].st == ESTABLISHED && !x[0].busy)
		ONE(1, E_REQUEST, x[1].st == ESTABLISHED && !x[1].busy)
#endif
#ifdef CRASH
		ONE(0, E_CRASH, !x[0].crashed)
		ONE(1, E_CRASH, !x[1].crashed)
#endif
#ifdef DETACH
		ONE(0, E_DETACH, x[0].st != PLAIN)
		ONE(1, E_DETACH, x[1].st != PLAIN)
#endif
		:: !calm && x[0].up && x[1].up ->	/* a path exists, and from now on it works */
			calm = 1; broken = 0; fuel = 0; ticks = 0;
			x[0].written = WRITES + 1; x[1].written = WRITES + 1;
		:: QUIET && ANY_TIMER && !OVER ->
			rounds++;
			assert(rounds < ROUNDS);	/* else they wait for ever */
			x[0].due = x[0].armed; x[1].due = x[1].armed;
			x[0].resend = UNDELIVERED(0); x[1].resend = UNDELIVERED(1);
		fi;
#ifdef GAP
		if
		:: true
		:: (event == E_MESSAGE || event == E_RESULT || event == E_TIMER || event == E_NETWORK) &&
		   tcp[h] -> gap = 1
		fi;
#endif
#ifdef FAILS
		if
		:: true
		:: !calm && fuel > 0 && MAY_FAIL && (event == E_MESSAGE || event == E_RESULT || event == E_TIMER ||
		   event == E_NETWORK) -> boom = 1
		fi;
#endif
		d_step {
			act = A_NONE; out = 0; sent = 0;
			if
			:: event == E_MESSAGE && USABLE(h, (m >> 8) & 3) -> on_message()
			:: event == E_RESULT -> on_result()
			:: event == E_TIMER -> on_timer()
			:: event == E_NETWORK -> on_network()
			:: event == E_REQUEST -> on_request()
			:: event == E_SEGMENT -> receive()
			:: event == E_SEND ->
				me.nxt = me.written;
				segment(me.tup, me.una, me.written, me.rcv, 0, 0)
			:: event == E_PROBE -> segment(me.tup, me.una, me.una, me.rcv, 0, 1)
			:: event == E_DETACH -> ended()
			:: event == E_CRASH -> me.crashed = 1; me.st = PLAIN; forget()
			:: else
			fi
		};
		d_step {
			go_on();
			transmit();
			tell();
			clear();
			always()
		}
	}
	od;
	at_rest()
}
