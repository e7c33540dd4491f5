# Sourced: runs steps under a limit each and all of them under one, and says at the end what became
# of them. The caller sets STEPS_DEADLINE (seconds of `date +%s`), STEPS_LOGS (a folder).
#   step NAME LIMIT_S COMMAND...   status 0: passed; 77: skipped, its last line says why; else failed
#   steps_end                      prints the table; status 1 if a step failed
STEPS_TABLE=
STEPS_FAILED=0

steps_note() {  # name, status, seconds, reason
  STEPS_TABLE="$STEPS_TABLE$(printf '%-22s %-8s %4d s  %s' "$1" "$2" "$3" "$4")
"
  printf -- '--- %s: %s (%d s) %s\n' "$1" "$2" "$3" "$4"
  if [ "$2" = failed ]; then STEPS_FAILED=1; fi
}

step() {
  step_name=$1 step_limit=$2
  shift 2
  step_start=$(date +%s)
  step_left=$((STEPS_DEADLINE - step_start))
  if [ "$step_left" -le 0 ]; then
    steps_note "$step_name" failed 0 "no time was left for it"
    return 0
  fi
  if [ "$step_limit" -gt "$step_left" ]; then step_limit=$step_left; fi
  step_log=$STEPS_LOGS/$step_name.log
  printf '\n=== %s (at most %d s)\n' "$step_name" "$step_limit"
  step_status=0
  timeout -k 10 "$step_limit" "$@" > "$step_log" 2>&1 < /dev/null || step_status=$?
  step_took=$(($(date +%s) - step_start))
  step_last=$(sed '/^[[:space:]]*$/d' "$step_log" | tail -n 1 | cut -c 1-200)
  case $step_status in
    0) tail -n 30 "$step_log"; steps_note "$step_name" passed "$step_took" "" ;;
    77) steps_note "$step_name" skipped "$step_took" "$step_last" ;;
    124 | 137) tail -n 60 "$step_log"
      steps_note "$step_name" failed "$step_took" "stopped after its $step_limit s; last: $step_last" ;;
    *) tail -n 60 "$step_log"
      steps_note "$step_name" failed "$step_took" "status $step_status; see $step_log" ;;
  esac
}

steps_end() {
  printf '\n%s' "$STEPS_TABLE"
  return "$STEPS_FAILED"
}
