package server

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"github.com/agentiso/agentiso/internal/domain"
)

// pssBytes is the proportional set size of machine p, from
// /proc/PID/smaps_rollup (proc(5)); 0 when it cannot be told, as when the
// machine runs as another user than the daemon, or is not that process any
// more.
func pssBytes(p domain.Process) int64 {
	if p.PID <= 0 {
		return 0
	}
	dir := fmt.Sprintf("/proc/%d/", p.PID)
	rollup, err := os.ReadFile(dir + "smaps_rollup")
	if err != nil || startTicks(dir) != p.StartTicks {
		return 0
	}
	for line := range bytes.Lines(rollup) {
		f := bytes.Fields(line)
		if len(f) >= 2 && string(f[0]) == "Pss:" {
			kib, _ := strconv.ParseInt(string(f[1]), 10, 64)
			return kib << 10
		}
	}
	return 0
}

// startTicks is field 22 of stat, the process's start; the fields after the
// command name, which may hold blanks and parentheses, begin with field 3.
func startTicks(dir string) uint64 {
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return 0
	}
	f := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(f) < 20 {
		return 0
	}
	n, _ := strconv.ParseUint(string(f[19]), 10, 64)
	return n
}
