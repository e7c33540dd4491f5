/* SPDX-License-Identifier: Apache-2.0
 * One wait in full: look, yield, sleep on the futex; one post in full: store, ask for sleepers, wake.
 *
 *   TICKS n     meets                     NO_SLICE      a futex wait never times out by itself
 *   ABORT       rank 0 may abort          SPURIOUS      a futex wait may return early (a signal)
 *   LEAVE       rank 0 may leave
 *
 * `timeout` is true where nothing else in the whole model can run; the slices of all who sleep end
 * there. A wait that this happens to MOST_SLICES times has found nothing to act upon. */
#define NOBODY_DIES
#include "group.h"

#ifndef TICKS
#define TICKS 2
#endif
#define RING 4

typedef Header {
  byte tick[RING];
  byte sleepers;
  bool left;
};
Header header[N];
#define TICK(r) header[r].tick[mine % RING] /* a collective of one meet: sequence number = tick */

/* The kernel's queue: rank w sleeps on a tick of this rank; N: on none. The compare and the queueing
 * are one step there, under the lock of the hash bucket, as is a wake. */
byte asleep_on[N] = N;
byte asleep_at[N];

inline wake_line(r, l) {
  d_step { /* proof: sleep.wake */
    if
    :: asleep_on[0] == (r) && asleep_at[0] == (l) -> asleep_on[0] = N; asleep_at[0] = 0
    :: else
    fi;
    if
    :: asleep_on[1] == (r) && asleep_at[1] == (l) -> asleep_on[1] = N; asleep_at[1] = 0
    :: else
    fi;
    if
    :: asleep_on[2] == (r) && asleep_at[2] == (l) -> asleep_on[2] = N; asleep_at[2] = 0
    :: else
    fi
  }
}

inline wake(r) {
  wake_line(r, 0);
  wake_line(r, 1);
  wake_line(r, 2);
  wake_line(r, 3)
}

inline post() {
#ifdef BUG_NO_FENCE
  /* release instead of seq_cst: the store may wait in the store buffer until after the load */
  has_sleepers = header[me].sleepers != 0;
  d_step { mine++; TICK(me) = mine };
#else
  d_step { mine++; TICK(me) = mine }; /* proof: meet.post */
  has_sleepers = header[me].sleepers != 0; /* proof: sleep.ask */
#endif
  if
  :: has_sleepers -> wake(me)
  :: !has_sleepers -> skip
  fi
}

byte slices[N]; /* that a rank has slept through in the wait it is in */
#define MOST_SLICES 3

inline slice_ends() {
  d_step {
    slices[0] = slices[0] + (asleep_on[0] != N -> 1 : 0);
    slices[1] = slices[1] + (asleep_on[1] != N -> 1 : 0);
    slices[2] = slices[2] + (asleep_on[2] != N -> 1 : 0);
    asleep_on[0] = N;
    asleep_on[1] = N;
    asleep_on[2] = N;
    asleep_at[0] = 0;
    asleep_at[1] = 0;
    asleep_at[2] = 0
  }
}

inline sleep_on(r) {
#ifndef BUG_NO_REGISTER
  header[r].sleepers++; /* proof: sleep.register */
#endif
  seen = TICK(r); /* proof: sleep.recheck */
#ifndef BUG_NO_VALUE_COMPARE
#define IS_UNCHANGED (TICK(r) == seen)
#else
#define IS_UNCHANGED true
#endif
  if
  :: seen < mine ->
     atomic { /* proof: sleep.wait */
       if
       :: IS_UNCHANGED -> asleep_on[me] = r; asleep_at[me] = mine % RING
       :: !IS_UNCHANGED -> skip
       fi
     }
     if
     :: asleep_on[me] == N -> skip
#ifdef SPURIOUS
     :: d_step { asleep_on[me] != N && spurious == 0 -> asleep_on[me] = N; asleep_at[me] = 0; spurious = 1 }
#endif
#ifndef NO_SLICE
     :: atomic { timeout -> slice_ends() } /* proof: sleep.slice */
#endif
     fi;
  :: seen >= mine -> skip
  fi;
#ifndef BUG_NO_REGISTER
  atomic { header[r].sleepers--; seen = 0 } /* proof: sleep.unregister */
#endif
}

inline await(r) {
  do
  :: atomic { TICK(r) >= mine -> break } /* proof: meet.await */
  :: atomic { TICK(r) < mine -> assert(slices[me] < MOST_SLICES) } /* P3: no wait for ever */
     if
     :: yields == 0 -> yields = 1
     :: yields == 1 -> sleep_on(r)
     fi;
     if
     :: atomic { TICK(r) >= mine -> break }
     :: TICK(r) < mine -> skip
     fi;
#ifndef BUG_NO_ABORT_CHECK
     if
     :: atomic { record != FREE -> goto observe }
     :: record == FREE -> skip
     fi;
#endif
#if defined(LEAVE)
     if /* proof: leave.observe */
     :: header[r].left ->
        if
        :: atomic { TICK(r) >= mine -> break }
        :: atomic { TICK(r) < mine -> text = LEFT(r); goto fail_group }
        fi
     :: !header[r].left -> skip
     fi
#endif
  od;
  atomic { slices[me] = 0; yields = 0; seen = 0 }
}

inline wake_all() {
  wake(0);
  wake(1);
  wake(2)
}

#define FORGET mine = 0; seen = 0; text = 0; saw = 0; slices[me] = 0; yields = 0; spurious = 0; won = false; has_sleepers = false

proctype Rank(byte me) {
  byte mine, seen, text, saw, yields, spurious;
  bool won, has_sleepers;
    do
    :: mine < TICKS ->
#ifdef ABORT
       if
       :: me == 0 -> text = CALLED; goto fail_group
       :: true -> skip
       fi;
#endif
#ifdef LEAVE
       if
       :: me == 0 -> goto leave
       :: true -> skip
       fi;
#endif
       post();
       await((me + 1) % N);
       await((me + 2) % N)
    :: mine == TICKS -> break
    od;
    goto leave;
  fail_group:
    publish_abort(text, won);
#ifndef BUG_NO_ABORT_WAKE
    if
    :: won -> wake_all()
    :: !won -> skip
    fi;
#endif
  observe:
    observe_abort();
  leave:
    header[me].left = true; /* proof: leave */
#if defined(LEAVE)
    wake(me);
#endif
    d_step { FORGET }
}

init {
  atomic {
    run Rank(0);
    run Rank(1);
    run Rank(2)
  }
}
