/* SPDX-License-Identifier: Apache-2.0
 * The staging slots: who writes and who reads which, through collectives of several chunks, in the
 * three forms that share them. No failures: after one nobody uses what a slot holds.
 *
 *   FORM    1 pipeline, 2 pipeline in which rank 0 announced a block (MIXED: and rank 1 as well),
 *           3 two phases
 *   CHUNKS  of the collective between two collectives of one chunk
 *   SLOTS   per rank (C++: 4) */
#define N 3

#ifndef SLOTS
#define SLOTS 4
#endif
#ifndef CHUNKS
#define CHUNKS 5
#endif
#ifndef FORM
#define FORM 1
#endif

#define PIPELINE 1
#define LATE 2
#define TWO_PHASES 3
#ifdef MIXED
#define IS_LATE(r) ((r) <= 1)
#else
#define IS_LATE(r) ((r) == 0)
#endif

/* One line per rank is enough here: ring and fingerprints are in meet.pml. */
byte tick_of[N];

typedef Slot {
  byte chunk;   /* what it holds, counted from 1 */
  byte slices;  /* two phases: reduced slices stored into it */
};
typedef Staging {
  Slot slot[SLOTS];
};
Staging staging[N];
#define SLOT(r, c) staging[r].slot[(c) % SLOTS]

inline post() {
  d_step { /* proof: meet.post */
    mine++;
    tick_of[me] = mine
  }
}

inline await(r, t) {
  (tick_of[r] >= (t)) /* proof: meet.await */
}

inline await_all() {
  await((me + 1) % N, mine);
  await((me + 2) % N, mine)
}

/* One step each: a write that may overlap a read may also come right before it, and the read then
 * finds the wrong chunk. */
inline put(chunk_put) {
  d_step { /* proof: slot.put */
    SLOT(me, chunk_put).chunk = chunk_put;
    SLOT(me, chunk_put).slices = 0
  }
}

/* P1, P4: the very chunk, of which its owner had posted the tick */
inline take_from(r, taken) {
  d_step { /* proof: slot.take */
    assert(SLOT(r, taken).chunk == taken)
  }
}

#ifdef BUG_TAKE_BEFORE_AWAIT
#define FIRST_TICK(c) (first + (c) - 1)
#else
#define FIRST_TICK(c) (first + (c))
#endif
#ifdef BUG_LATE_FORGOTTEN
#define LATE_TICK(r) 0
#else
#define LATE_TICK(r) (late && IS_LATE(r) -> 1 : 0)
#endif

inline pipeline(chunks, has_late) {
  late = has_late;
  c = 0;
  do
  :: c < chunks ->
     if
     :: c + 1 < chunks ->
        put(base + c + 1);
        post()
     :: c + 1 >= chunks -> skip
     fi;
     await((me + 1) % N, FIRST_TICK(c) + LATE_TICK((me + 1) % N));
     await((me + 2) % N, FIRST_TICK(c) + LATE_TICK((me + 2) % N));
     take_from((me + 1) % N, base + c);
     take_from((me + 2) % N, base + c);
     c++
  :: c >= chunks -> break
  od;
  base = base + chunks;
  c = 0;
  late = false
}

inline staged(chunks) {
  put(base);
  post(); /* announce */
  await_all();
  first = mine;
  pipeline(chunks, false)
}

/* Some ranks' operands are shared: those stage one tick later. */
inline mixed(chunks) {
  if
  :: IS_LATE(me) ->
     post(); /* announce: a block, nothing staged yet */
     await_all();
     first = mine;
     put(base);
     post()
  :: !IS_LATE(me) ->
     put(base);
     post();
     await_all();
     first = mine
  fi;
  pipeline(chunks, true);
  if
  :: !IS_LATE(me) -> post() /* the late ranks posted one more */
  :: IS_LATE(me) -> skip
  fi
}

/* Every rank stores its slice of a chunk into all ranks' slots. */
inline push_to(r) {
  d_step { /* proof: slot.push */
    assert(SLOT(r, base + c).chunk == base + c); /* P4: only into the chunk of this meet */
    SLOT(r, base + c).slices++
  }
}

inline two_phases(chunks) {
  c = 0;
  do
  :: c < chunks ->
     put(base + c);
     post();
     await_all();
     push_to(0);
     push_to(1);
     push_to(2);
#ifndef BUG_NO_SECOND_MEET
     post();
     await_all();
#endif
     d_step { /* the whole chunk is copied out */
       assert(SLOT(me, base + c).chunk == base + c && SLOT(me, base + c).slices == N);
       c++
     }
  :: c >= chunks -> break
  od;
  base = base + chunks;
  c = 0
}

byte finished;

proctype Rank(byte me) {
  byte mine, first, c, base = 1;
  bool late;
  staged(1);
#if FORM == PIPELINE
  staged(CHUNKS);
#elif FORM == LATE
  mixed(CHUNKS);
#else
  two_phases(CHUNKS);
#endif
  staged(1);
  finished++
}

init {
  atomic {
    run Rank(0);
    run Rank(1);
    run Rank(2)
  }
  (finished == N);
  assert(tick_of[0] == tick_of[1] && tick_of[1] == tick_of[2]) /* the ranks stay in step */
}
