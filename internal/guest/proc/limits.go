package proc

import (
	"errors"
	"log/slog"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/reap"
)

// Descriptor limits. Children get what systemd gives to services: 1024 for
// programs that use select(2) or walk over all descriptors, and leave to raise
// it. The agent itself holds up to three descriptors per process.
const (
	childFilesSoft = 1024
	childFilesHard = 524288
	agentFiles     = 65536
)

// childLimits is what children must not inherit from the agent.
type childLimits struct {
	resetOOM  bool // the agent is protected from the OOM killer
	resetNice bool
	files     uint64 // hard limit for children; 0: leave it
	log       *slog.Logger
}

// newChildLimits raises the agent's own limits and notes what has to be reset.
func newChildLimits(log *slog.Logger) childLimits {
	l := childLimits{log: log}
	keepFiles()
	l.resetOOM = intFile("/proc/self/oom_score_adj") != 0
	// getpriority(2) itself returns 20-nice.
	if p, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil && p != 20 {
		l.resetNice = true
	}
	var now unix.Rlimit
	if unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &now) != nil {
		return l
	}
	want := unix.Rlimit{Cur: max(now.Cur, agentFiles), Max: max(now.Max, childFilesHard)}
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &want, nil); err != nil {
		// Without the right to raise the hard limit, what there is must do.
		want = unix.Rlimit{Cur: now.Max, Max: now.Max}
		if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, &want, nil); err != nil {
			log.Info("descriptor limit stays as it is", "err", err)
		}
	}
	l.files = min(want.Max, childFilesHard)
	return l
}

// apply gives a started process its own limits. It may have forked by now:
// whoever is in its cgroup is treated as well.
func (l childLimits) apply(c *reap.Child, tr *tree) {
	err := c.WhileHeld(func(pid int) error {
		l.applyTo(pid)
		return nil
	})
	if err != nil && !errors.Is(err, reap.ErrExited) {
		l.log.Warn("set limits of a process", "err", err)
	}
	if !l.resetOOM && !l.resetNice {
		return
	}
	for _, pid := range tr.processes() {
		if pid != c.PID() {
			l.applyTo(pid)
		}
	}
}

// applyTo ignores errors: the process may be gone, and root's processes can
// have other limits set already.
func (l childLimits) applyTo(pid int) {
	if l.files > 0 {
		_ = unix.Prlimit(pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: min(childFilesSoft, l.files), Max: l.files}, nil)
	}
	if l.resetOOM {
		_ = writeFile("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", "0")
	}
	if l.resetNice {
		_ = unix.Setpriority(unix.PRIO_PROCESS, pid, 0)
	}
}

// keepFiles keeps descriptors that the agent itself has inherited from its
// children; all that Go opens are kept already.
func keepFiles() {
	d, err := os.Open("/proc/self/fd")
	if err != nil {
		return
	}
	defer d.Close()
	names, _ := d.Readdirnames(4096)
	for _, s := range names {
		if fd, err := strconv.Atoi(s); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
}
