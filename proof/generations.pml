/* SPDX-License-Identifier: Apache-2.0
 * After a failure in generation 1: the survivors and a replacement meet again, in new memory, while
 * the rank that was given up resumes and goes on writing into what it has mapped. The first such
 * meeting may fail half-way, some ranks welcomed and some not; then there is another.
 *
 *   LOST r   the rank that is stopped and replaced (0: the host of the meeting is new as well)
 *   REFILL   a survivor uses the block of the failed collective again as an operand: see README.md */
#define N 3

#ifndef LOST
#define LOST 2
#endif
#define ROUNDS 3 /* meetings: the first group, a recovery that may fail, a recovery */

/* Process p < N is rank p of the first group; process N is the replacement of rank LOST. */
#define PROCESSES 4
#define RANK_OF(p) ((p) == N -> LOST : (p))
#define PROCESS_OF(r) ((r) == LOST -> N : (r)) /* in the recoveries */

/* Arena a: made by process a % PROCESSES for meeting a / PROCESSES. */
#ifdef BUG_SAME_MEMORY
#define ARENA(p, round) ((p) == N -> N + PROCESSES * (round) : (p))
#else
#define ARENA(p, round) ((p) + PROCESSES * (round))
#endif
byte serves[16];     /* the meeting whose group uses the arena */
bool is_operand[16]; /* its block from the first group is an operand again */
byte writer_of[16];  /* the meeting of whoever stored into that block last */

/* A caller's hello and its answer; the memory itself travels with them. */
typedef Call {
  bool is_here;
  byte known;      /* the highest generation this process has been in */
  byte arena;
  byte generation; /* the answer; 0: none yet */
  bool is_refused;
};
Call call[12]; /* [meeting * N + rank] */
#define CALL(r) call[(round - 1) * N + (r)]

byte first_map[N]; /* the arenas of the first group, as all its members have mapped them */
bool has_failed;   /* the first group: the survivors have stopped waiting for LOST */
bool second_failed;

inline max_known() {
  agreed = CALL(0).known;
  agreed = (CALL(1).known > agreed -> CALL(1).known : agreed);
  agreed = (CALL(2).known > agreed -> CALL(2).known : agreed)
}

/* Rank 0's answers go out one by one. In the second meeting any may be missing: the host, or the
 * caller, failed there. */
inline answer(r) {
  if
  :: d_step { true -> CALL(r).generation = agreed }
  :: d_step { round == 2 -> CALL(r).is_refused = true; second_failed = true }
  fi
}

inline meet_again() {
  d_step { /* proof: gen.meet */
    CALL(rank).known = known;
    CALL(rank).arena = ARENA(me, round);
    CALL(rank).is_here = true;
    serves[ARENA(me, round)] = round
  }
  if
  :: rank == 0 ->
     (CALL(0).is_here && CALL(1).is_here && CALL(2).is_here);
     d_step { /* proof: gen.agree */
       max_known();
       agreed++
     }
     answer(1);
     answer(2);
     CALL(0).generation = agreed
  :: rank != 0 -> skip
  fi;
  if
  :: atomic { CALL(rank).generation != 0 -> 
#ifdef BUG_OWN_PLUS_ONE
       generation = known + 1;
#else
       generation = CALL(rank).generation;
#endif
       /* nobody is ever twice in one generation, and those who are together are in the same */
       assert(generation > known);
       known = generation;
       called[(round - 1) * N + rank] = generation }
  :: atomic { CALL(rank).is_refused -> generation = 0 }
  fi
}

byte called[12]; /* by meeting and rank: the generation that the rank believes to be in */

/* A store into rank r's memory, through the mapping that came with the meeting; `mine` is the
 * meeting of the writer. */
inline store(target, mine) {
  d_step { /* proof: gen.fence */
    assert(serves[target] == mine); /* P5 */
    assert(!is_operand[target] || mine != 1);
    writer_of[target] = mine
  }
}

proctype Rank(byte me) {
  byte round = 1, rank, known, generation, agreed;
  d_step {
    rank = RANK_OF(me);
    if
    :: me < N -> known = 1; generation = 1
    :: else -> round = 2
    fi
  }
  if
  :: me < N ->
     /* the collective in which the group fails: slices go into all blocks, at any time */
     store(first_map[0], 1);
     store(first_map[1], 1);
     store(first_map[2], 1);
     if
     :: me == LOST -> goto done /* it may have come this far only after everything below */
     :: me != LOST -> has_failed = true /* timeout; LOST's own stores need not have happened */
     fi;
     round = 2
#ifdef REFILL
     ;
     is_operand[first_map[rank]] = true
#endif
  :: me == N -> (has_failed)
  fi;
  meet_again();
  if
  :: generation != 0 && !second_failed ->
     store(CALL(0).arena, round);
     store(CALL(1).arena, round);
     store(CALL(2).arena, round)
  :: second_failed -> skip
  fi;
  (second_failed || (CALL(0).generation != 0 && CALL(1).generation != 0 && CALL(2).generation != 0));
  if
  :: second_failed ->
     round = 3;
     meet_again();
     store(CALL(0).arena, round);
     store(CALL(1).arena, round);
     store(CALL(2).arena, round)
  :: !second_failed -> skip
  fi;
  /* those who are in a group together mean the same generation */
  d_step {
    assert(called[(round - 1) * N] == 0 || called[(round - 1) * N] == generation);
    assert(called[(round - 1) * N + 1] == 0 || called[(round - 1) * N + 1] == generation);
    assert(called[(round - 1) * N + 2] == 0 || called[(round - 1) * N + 2] == generation)
  }
done:
  skip
}

init {
  atomic {
    first_map[0] = ARENA(0, 1);
    first_map[1] = ARENA(1, 1);
    first_map[2] = ARENA(2, 1);
    serves[ARENA(0, 1)] = 1;
    serves[ARENA(1, 1)] = 1;
    serves[ARENA(2, 1)] = 1;
    run Rank(0);
    run Rank(1);
    run Rank(2);
    run Rank(3)
  }
}
