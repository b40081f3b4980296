package main

import "github.com/spf13/cobra"

const exitCodesHelp = `Exit codes

  0     success
  1     internal error: a bug or an unforeseen failure of the host
  2     the command line, the configuration or a request is wrong
  3     no such workspace, image, kernel or file, or an ambiguous id
  4     not possible now: name taken, wrong state, still in use
  5     over a limit, or a disk is full
  6     the daemon or the guest does not answer
  7     the host lacks a program, file or right, or cannot do it
  8     it took longer than allowed
  9     the guest did not boot
  10    not allowed
  130   interrupted (128 + the signal's number)

run and exec leave with the exit code of the command inside, and on their own
account with
  124   --timeout has passed
  125   agentiso itself failed: any of the errors above
  126   the command was found but cannot be executed
  127   the command was not found
  128+N the command was ended by signal N

doctor leaves with 1 when a check failed.`

const jsonHelp = `Output for programs

With --json every command that prints data prints JSON on standard output: one
object a line (JSON Lines), so a list of three workspaces is three lines, and
nothing else. Field names are stable; fields may be added. Sizes are bytes
unless the name says otherwise (memory_mib), times are RFC 3339, durations are
milliseconds (_ms).

  create, start    {"workspace": {...}, "timings": {"start", "total_ms", "steps": [{"name", "ms"}]}}
  ls, info REF,
  stop, rename     a workspace: {"id", "name", "state", "image", "cpus", "memory_mib", "disk_bytes", ...}
  info             the daemon: {"version", "pid", "socket", "data_dir", "accelerator", ...}
  destroy          {"id"}
  run, exec        as it comes {"stdout": TEXT} and {"stderr": TEXT} ({"stdout_base64"} for what is
                   not UTF-8), then {"exit_code"}; run begins with what create prints
  cp               {"files", "bytes", "skipped"}
  logs             {"data": TEXT}
  stats            {"name", "id", "stats": {...}}
  image ...        an image: {"digest", "names", "size_bytes", ...}; rm: {"digest", "disk_removed"}
  kernel ...       a kernel: {"name", "release", "default", ...}
  doctor           {"name", "verdict": "ok"|"warn"|"fail", "detail", "next"}
  config print     {"key", "value", "source", "line", "doc"}
  up, down         {"running", "pid", "socket", "started" or "stopped"}
  bench            {"bench", "case", "metric", "unit", "n", "min", "p50", "p90", "p99", "max", "ratio_to", "ratio"}

Errors are one object on standard error:
  {"error": {"kind", "message", "next", "exit_code"}}
Kinds: internal, invalid, not_found, ambiguous, name_taken, wrong_state, in_use,
limit, no_space, unavailable, missing, unsupported, timeout, boot_failed,
unauthorized, canceled.`

// helpTopics are shown by `agentiso help TOPIC`.
func helpTopics() []*cobra.Command {
	return []*cobra.Command{
		{Use: "exit-codes", Short: "What exit codes mean", Long: exitCodesHelp},
		{Use: "json", Short: "Output for programs", Long: jsonHelp},
	}
}
