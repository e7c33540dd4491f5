#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Verifies the models exhaustively, and that each mutated model is caught. One line a configuration.
#   proof/check.sh [PATTERN]     PATTERN: only configurations whose name contains it
set -u
here=$(cd "$(dirname "$0")" && pwd)
pattern=${1:-}
command -v spin >/dev/null 2>&1 || {
  echo "proof: spin is missing: apt-get install spin (Debian, Ubuntu), or https://spinroot.com" >&2
  exit 77
}
CC=${CC:-cc}
command -v "$CC" >/dev/null 2>&1 || { echo "proof: no C compiler ($CC)" >&2; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0
DEPTH=10000
CHECKS=-DSAFETY OPTIONS=
printf '%-44s %10s %6s %6s %7s\n' configuration states depth s MB

complain() {
  failures=$((failures + 1))
  echo "FAILED: $1" >&2
}

# run NAME MODEL FLAGS...: leaves pan's report in $work/report; 1 if the model does not build
run() {
  name=$1 model=$2
  shift 2
  rm -f "$work"/pan* "$work"/*.trail "$work/report"
  (cd "$work" && spin -a "$@" "$here/$model" >report 2>&1 &&
    "$CC" -O2 -w $CHECKS -DCOLLAPSE -DMEMLIM=1900 -o pan pan.c >>report 2>&1) || {
    cat "$work/report" >&2
    return 1
  }
  begin=$(date +%s)
  (cd "$work" && ./pan -m$DEPTH -w22 $OPTIONS >report 2>&1)
  seconds=$(($(date +%s) - begin))
  states=$(awk '/states, stored/ { print $1; exit }' "$work/report")
  depth=$(sed -n 's/.*depth reached \([0-9]*\),.*/\1/p' "$work/report")
  memory=$(awk '/total actual memory usage/ { print int($1) }' "$work/report")
  printf '%-44s %10s %6s %6s %7s  ' "$name" "${states:-?}" "${depth:-?}" "$seconds" "${memory:-?}"
}

wanted() { case $1 in *"$pattern"*) ;; *) return 1 ;; esac }

# holds NAME MODEL FLAGS...: no error in a search that left nothing out
holds() {
  wanted "$1" || return 0
  if ! run "$@"; then complain "$1 does not build"; return; fi
  if grep -q 'errors: 0$' "$work/report" &&
    ! grep -q -e 'Search not completed' -e 'max search depth too small' -e 'out of memory' \
      -e 'MEMLIM bound' -e 'hash factor' -e '^error' "$work/report"; then
    echo holds
  else
    echo FAILED
    cat "$work/report" >&2
    complain "$1"
  fi
  # lines of the model that this configuration has, and those that it never came to
  (cd "$work" && ./pan -d 2>/dev/null) | grep -o "[a-z]*\.\(pml\|h\):[0-9]*" | sort -u >"$work/has"
  grep -v 'D_STEP' "$work/report" | sed -n 's/^\t.*\/\([a-z]*\.\(pml\|h\):[0-9]*\), state.*/\1/p' | sort -u >"$work/missed"
  cat "$work/has" >>"$work/all"
  comm -23 "$work/has" "$work/missed" >>"$work/reached"
}

# caught NAME MODEL FLAGS...: an error is found, of the kind EXPECT
caught() {
  wanted "$1" || return 0
  if ! run "$@"; then complain "$1 does not build"; return; fi
  what=$(sed -n 's/^pan:1: \(.*\) (at depth.*/\1/p' "$work/report")
  case $what in
    "$EXPECT"*) echo "caught: $what" | cut -c1-70 ;;
    *)
      echo "NOT CAUGHT (${what:-no error}; expected: $EXPECT)"
      complain "$1: expected $EXPECT"
      ;;
  esac
}

holds "meet: barriers round the ring" meet.pml -DSEQS=6
holds "meet: shared blocks" meet.pml -DSEQS=3 -DSHARED
holds "meet: shared, a stop and resume" meet.pml -DSEQS=2 -DSHARED -DSLOW
holds "meet: shared, a stop for ever" meet.pml -DSEQS=2 -DSHARED -DFREEZES=1
holds "meet: barriers, a death at any step" meet.pml -DSEQS=2 -DCRASHES=1
holds "meet: shared, a death at any step" meet.pml -DSEQS=1 -DSHARED -DCRASHES=1
holds "meet: abort() and a death" meet.pml -DSEQS=1 -DCRASHES=1 -DCALLER_ABORT -DNAMES_THE_DEAD
holds "meet: mismatch" meet.pml -DSEQS=2 -DSHARED -DMISMATCH
holds "meet: mismatch and a stop" meet.pml -DSEQS=2 -DMISMATCH -DSLOW
holds "meet: one leaves early" meet.pml -DSEQS=2 -DSHARED -DEARLY_LEAVE
holds "meet: one calls abort()" meet.pml -DSEQS=2 -DSHARED -DCALLER_ABORT
CHECKS=-DNP OPTIONS=-l
holds "meet: no cycle at all (a stop)" meet.pml -DSEQS=1 -DSHARED -DSLOW
CHECKS=-DSAFETY OPTIONS=
holds "slots: pipeline" slots.pml -DFORM=1
holds "slots: pipeline, rank 0 late" slots.pml -DFORM=2
holds "slots: pipeline, ranks 0 and 1 late" slots.pml -DFORM=2 -DMIXED
holds "slots: two phases" slots.pml -DFORM=3
holds "sleep: no slice, no lost wake-up" sleep.pml -DTICKS=2 -DNO_SLICE
holds "sleep: no slice, early returns" sleep.pml -DTICKS=1 -DNO_SLICE -DSPURIOUS
holds "sleep: abort" sleep.pml -DTICKS=2 -DABORT
holds "sleep: leave" sleep.pml -DTICKS=2 -DLEAVE
holds "generations: rank 2 replaced" generations.pml -DLOST=2
holds "generations: rank 0 replaced" generations.pml -DLOST=0

# What must be caught: the models would be blind otherwise.
EXPECT="assertion violated"
caught "BUG one line" meet.pml -DSEQS=3 -DRING=1
caught "BUG tick before what it announces" meet.pml -DBUG_NO_RELEASE
caught "BUG tick of the last meet accepted" meet.pml -DBUG_STALE_TICK
caught "BUG no second meet" meet.pml -DSHARED -DBUG_NO_SECOND_MEET
caught "BUG no fingerprint check" meet.pml -DSHARED -DMISMATCH -DBUG_NO_FINGERPRINT_CHECK
caught "BUG left, tick not looked at again" meet.pml -DBUG_LEAVE_NO_RECHECK
caught "BUG arena not retired" meet.pml -DSHARED -DSLOW -DBUG_NO_RETIRE
caught "BUG two-step record, slow claimer" meet.pml -DSLOW -DSLOW_CLAIMER -DBUG_TWO_STEPS
caught "BUG two-step record, claimer dies unnamed" meet.pml -DSEQS=1 -DCRASHES=1 -DCALLER_ABORT -DNAMES_THE_DEAD -DBUG_TWO_STEPS
caught "BUG three slots" slots.pml -DSLOTS=3
caught "BUG two slots" slots.pml -DSLOTS=2
caught "BUG three slots, late" slots.pml -DFORM=2 -DSLOTS=3
caught "BUG late ranks' tick forgotten" slots.pml -DFORM=2 -DBUG_LATE_FORGOTTEN
caught "BUG take before await" slots.pml -DBUG_TAKE_BEFORE_AWAIT
caught "BUG two phases without second meet" slots.pml -DFORM=3 -DBUG_NO_SECOND_MEET
caught "BUG the sleeper does not look for an abort" sleep.pml -DTICKS=1 -DABORT -DBUG_NO_ABORT_CHECK
caught "BUG the same memory again" generations.pml -DBUG_SAME_MEMORY
caught "BUG generation counted by each rank" generations.pml -DBUG_OWN_PLUS_ONE
caught "RULE block of a failed collective used again" generations.pml -DREFILL
EXPECT="invalid end state"
caught "BUG no abort check" meet.pml -DSEQS=1 -DCRASHES=1 -DBUG_NO_ABORT_CHECK
caught "BUG no death watch" meet.pml -DSEQS=1 -DCRASHES=1 -DBUG_NO_DEATH_WATCH
caught "BUG no deadline" meet.pml -DFREEZES=1 -DBUG_NO_DEADLINE
caught "BUG no look at who left" meet.pml -DEARLY_LEAVE -DBUG_NO_LEAVE_CHECK
caught "BUG a claimer waited for for ever" meet.pml -DSEQS=1 -DCRASHES=1 -DCALLER_ABORT -DBUG_TWO_STEPS -DBUG_NO_CLAIM_EXPIRY
caught "BUG post without the fence" sleep.pml -DNO_SLICE -DBUG_NO_FENCE
caught "BUG sleeper not registered" sleep.pml -DNO_SLICE -DBUG_NO_REGISTER
caught "BUG futex does not compare" sleep.pml -DNO_SLICE -DBUG_NO_VALUE_COMPARE
caught "NEED the slice, for an abort" sleep.pml -DTICKS=1 -DABORT -DNO_SLICE
caught "NEED the slice, for a leave" sleep.pml -DTICKS=1 -DLEAVE -DNO_SLICE

if [ -z "$pattern" ]; then
  sort -u "$work/all" >"$work/all.sorted"
  sort -u "$work/reached" >"$work/reached.sorted"
  # check(1) finds no mismatch: check(0) has found it
  exempt=$(grep -n 'text = MISMATCHED' "$here/meet.pml" | sed 's/:.*//; s/^/meet.pml:/')
  unreached=$(comm -23 "$work/all.sorted" "$work/reached.sorted" | grep -vxF "$exempt")
  [ -z "$unreached" ] || complain "never reached in any configuration: $(echo $unreached)"
fi
[ $failures -eq 0 ] || { echo "proof: $failures failed" >&2; exit 1; }
echo "proof: all hold, all mutants caught"
