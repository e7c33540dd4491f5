/* SPDX-License-Identifier: Apache-2.0
 * Meets over the ring of lines: announce, await, check; the shared form's slices and second meet;
 * leaving; failures at every step. Waits are guards here: how a rank sleeps is in sleep.pml.
 *
 *   SEQS n        collectives per rank              CRASHES n     ranks that may die, at any step
 *   RING n        lines per rank (C++: 4)           FREEZES n     ranks that may stop for ever
 *   SHARED        slice per rank and second meet    SLOW          any rank may stop and resume
 *   MISMATCH      rank 2 calls something else last  EARLY_LEAVE   rank 1 may close at any call
 *   CALLER_ABORT  rank 0 may call abort()           SLOW_CLAIMER, ABORT_ONE_STEP, NAMES_THE_DEAD: see README.md */
#include "group.h"

#ifndef SEQS
#define SEQS 2
#endif
#ifndef RING
#define RING 4
#endif

typedef Line {
  byte tick;
  byte fingerprint;
};
typedef Header {
  Line line[RING];
  bool left;
};
Header header[N];
#define LINE(r) header[r].line[seq % RING]

/* ---- what the C++ does not have: variables for the properties */
byte posted[N];  /* ticks that rank r has really posted */
byte exposed[N]; /* the collective for which rank r's block may be written by peers; 0: none */
byte slices[N];  /* slices stored into rank r's block in this collective */
bool failed[N];  /* has raised: its arena is retired, nothing in it is handed out any more */
bool reused[N];  /* the block belongs to something new */
bool someone_left_early;

#ifdef MISMATCH
#define IS_ODD(r, s) ((r) == 2 && (s) == SEQS)
#define IS_MISMATCH(s) ((s) == SEQS)
#else
#define IS_ODD(r, s) false
#define IS_MISMATCH(s) false
#endif
#define FINGERPRINT(r, s) ((s) + (IS_ODD(r, s) -> 100 : 0))

#define FAULT_WAS_INJECTED                                                              \
  (dead[0] || dead[1] || dead[2] || DEADLINE || someone_left_early || IS_MISMATCH(seq) || \
   record != FREE)

inline post() {
  d_step { /* proof: meet.post */
    tick++;
    LINE(me).tick = tick;
    posted[me] = tick
  }
}

inline announce() {
#ifdef BUG_NO_RELEASE /* the tick becomes visible before what it announces */
  post();
#endif
  d_step { /* proof: meet.announce */
    LINE(me).fingerprint = FINGERPRINT(me, seq);
    exposed[me] = seq
  }
#ifndef BUG_NO_RELEASE
  post()
#endif
}

/* Choices of this rank alone join the step that reads shared memory before them. */
inline await(peer) {
  if /* proof: meet.await */
#ifdef BUG_STALE_TICK
  :: LINE(peer).tick + 1 >= tick -> skip
#else
  :: LINE(peer).tick >= tick -> skip
#endif
#ifndef BUG_NO_ABORT_CHECK
  :: record != FREE -> goto observe
#endif
#ifndef BUG_NO_LEAVE_CHECK
  :: header[peer].left -> /* proof: leave.observe */
#ifdef BUG_LEAVE_NO_RECHECK
     text = LEFT(peer); goto fail_group
#else
     if
     :: LINE(peer).tick >= tick -> skip
     :: atomic { LINE(peer).tick < tick -> text = LEFT(peer); goto fail_group }
     fi
#endif
#endif
#ifndef BUG_NO_DEADLINE
  :: atomic { DEADLINE && LINE(peer).tick < tick -> text = TIMEOUT(peer); goto fail_group } /* proof: meet.deadline */
#endif
  fi
}

inline await_all() {
  await((me + 1) % N);
  await((me + 2) % N);
  /* P1: a meet of this tick returned, so every rank had posted it */
  assert(posted[0] >= tick && posted[1] >= tick && posted[2] >= tick)
}

/* One line per step: a line that changed meanwhile would show as a mismatch that nobody made. */
inline check(peer) {
  if /* proof: meet.check */
  :: LINE(peer).fingerprint == FINGERPRINT(me, seq) -> skip
#ifdef BUG_NO_FINGERPRINT_CHECK
  :: LINE(peer).fingerprint != FINGERPRINT(me, seq) -> skip
#else
  :: atomic { LINE(peer).fingerprint != FINGERPRINT(me, seq) -> text = MISMATCHED; goto fail_group }
#endif
  fi
}

/* Reads this rank's slice of one block and stores into it. */
inline push(peer) {
  d_step { /* proof: shared.push */
    assert(!IS_MISMATCH(seq));                    /* P6 */
    assert(exposed[peer] == seq || failed[peer]); /* P4: only in the collective announced for */
    assert(!reused[peer]);                        /* P4: not what came after it */
    slices[peer]++
  }
}

/* Nobody asks any more what this rank knew: fewer states. */
#define FORGET seq = 0; tick = 0; text = 0; saw = 0; won = false

proctype Rank(byte me) {
  byte seq, tick, text, saw;
  bool won;
  {
    do
    :: seq == SEQS -> break
    :: seq < SEQS ->
       seq++;
#ifdef EARLY_LEAVE
       if
       :: me == 1 -> someone_left_early = true; goto leave
       :: true -> skip
       fi;
#endif
#ifdef CALLER_ABORT
       if
       :: me == 0 -> text = CALLED; goto fail_group
       :: true -> skip
       fi;
#endif
       if /* proof: abort.check_usable */
       :: record != FREE -> goto observe
       :: record == FREE -> skip
       fi;
       announce();
       await_all();
       check(0);
       check(1);
       check(2);
#ifdef SHARED
       push(0);
       push(1);
       push(2);
#ifndef BUG_NO_SECOND_MEET
       post();
       await_all();
#endif
#endif
       d_step {
         assert(!IS_MISMATCH(seq)); /* P6: nobody gets past the check */
#ifdef SHARED
         assert(slices[me] == N); /* the result is whole when its owner uses it */
#endif
         slices[me] = 0;
         exposed[me] = 0 /* an ordinary tensor again: its owner may write, keep or free it */
       }
    od;
    goto leave;

  fail_group:
    assert(FAULT_WAS_INJECTED || text == CALLED); /* no failure without a cause */
    publish_abort(text, won);
  observe:
    observe_abort();
    d_step { /* proof: abort.retire */
      failed[me] = true;
#ifdef BUG_NO_RETIRE
      reused[me] = true
#endif
    };
  leave:
    atomic { /* proof: leave */
      header[me].left = true;
      FORGET
    }
  } unless { d_step { GONE(me) -> FORGET } }
}

/* One thread per rank, gone with its process; it may also wait here for ever. */
proctype Watch(byte me) {
  bool won;
  byte peer;
end_watch:
  {
    if /* proof: death.notice */
    :: atomic { me != 0 && dead[0] && !header[0].left -> peer = 0 }
    :: atomic { me != 1 && dead[1] && !header[1].left -> peer = 1 }
    :: atomic { me != 2 && dead[2] && !header[2].left -> peer = 2 }
    fi;
#ifndef BUG_NO_DEATH_WATCH
    publish_abort(LOST(peer), won); /* proof: death.report */
#endif
    d_step { peer = 0; won = false }
  } unless { d_step { GONE(me) -> peer = 0; won = false } }
}

init {
  byte i;
  atomic {
    for (i : 0 .. N - 1) {
      run Rank(i);
#if CRASHES > 0
      run Watch(i);
#endif
    }
  }
  i = 0;
  do
  :: i < CRASHES ->
     i++;
     if
     :: dead[0] = true
     :: dead[1] = true
     :: dead[2] = true
     :: true -> skip
     fi
  :: i >= CRASHES -> break
  od;
  i = 0;
  do
  :: i < FREEZES ->
     i++;
     if
     :: frozen[0] = true
     :: frozen[1] = true
     :: frozen[2] = true
     :: true -> skip
     fi
  :: i >= FREEZES -> break
  od
}
