/* SPDX-License-Identifier: Apache-2.0
 * What the models share: three ranks, their deaths, the abort record. A comment that says proof and a label names
 * a step; csrc carries the same comment where that step is.
 *
 * A rank is a process of the model inside `unless (GONE(me))`: the escape is tried before every
 * step, so that a crash may come between any two. */
#define N 3

bool dead[N];   /* SIGKILL: the death watches of the others notice it at some time */
bool frozen[N]; /* SIGSTOP for ever: nobody is told; only a deadline ends a wait for it */
#define GONE(r) (dead[r] || frozen[r])

/* SLOW: a rank may be stopped and resumed. A stop is a delay, which every interleaving has; what it
 * adds is that a deadline may pass while everybody lives. */
#ifdef SLOW
#define DEADLINE true
#else
#define DEADLINE (frozen[0] || frozen[1] || frozen[2])
#endif

#ifndef CRASHES
#define CRASHES 0
#endif
#ifndef FREEZES
#define FREEZES 0
#endif

/* ---- the abort record */
mtype = { FREE, CLAIMED, PUBLISHED };
mtype record = FREE;
byte claimer;
byte reason; /* what the record says */

/* kind and culprit in one byte */
#define LOST(r) (10 + (r))
#define LEFT(r) (20 + (r))
#define TIMEOUT(r) (30 + (r))
#define MISMATCHED 40
#define CALLED 50
#define UNKNOWN 60 /* "a rank aborted the group and died before it said why" */

byte agreed; /* what the first rank to raise reported; 0: nobody has */

/* Claims the record and fills it in, unless another has claimed it. `text` as in the C++. */
inline publish_abort(text, won) {
#ifndef BUG_TWO_STEPS
  won = true; /* proof: abort.publish */ /* into this rank's own header, complete before the claim */
  atomic { /* proof: abort.claim */
    if
    :: record == FREE -> record = PUBLISHED; claimer = me; reason = text
    :: else -> won = false
    fi
  }
#else
  atomic { /* proof: abort.claim */
    if
    :: record == FREE -> record = CLAIMED; claimer = me; won = true
    :: else -> won = false
    fi
  }
  if
  :: d_step { won -> reason = text; record = PUBLISHED } /* proof: abort.publish */
  :: !won -> skip
  fi
#endif
}

/* 50 ms have passed since the record was seen claimed. */
#ifdef BUG_NO_CLAIM_EXPIRY
#define EXPIRED false
#else
#ifdef SLOW_CLAIMER
#define EXPIRED true
#else
#define EXPIRED GONE(claimer)
#endif
#endif

/* What this rank raises; all ranks that raise must say the same. */
inline observe_abort() {
  if /* proof: abort.observe */
  :: record == PUBLISHED -> saw = reason
#if defined(BUG_TWO_STEPS) && !defined(NOBODY_DIES)
  :: record == CLAIMED && EXPIRED -> saw = UNKNOWN
#endif
  fi;
  d_step {
    assert(agreed == 0 || agreed == saw);
#ifdef NAMES_THE_DEAD /* what is reported has a culprit */
    assert(saw != UNKNOWN);
#endif
    agreed = saw
  }
}
