// Package proc serves process.Process: it starts, feeds, watches and ends
// processes inside the guest for clients over the link.
//
// # Output
//
// A process's output is kept in memory in one bounded log ([output]) with a
// position per attached stream. Order is kept per stream (stdout, stderr,
// terminal). While somebody is attached nothing is lost and a slow reader
// slows the process down, as a pipe does; a reader that holds up others for
// more than 30 seconds is detached with resource_exhausted. While nobody is
// attached the output is read and dropped, but for its last 64 KiB, so that a
// process whose stream was lost runs on. A later Connect gets what is written
// from then on; with the header "Agentiso-Replay: tail" it gets those last
// 64 KiB first.
//
// # End
//
// The end event comes after everything the process itself has written. When
// its output is still open in somebody who inherited it, the end is sent half a
// second after the process's own; what is written later is thrown away, but
// the writers are not disturbed.
//
// A request deadline kills everything that the process has started: its
// cgroup, or without cgroups its session and process group. So does SIGKILL by
// SendSignal; SIGTERM goes to the process group. A process that ends by itself
// leaves its background processes running.
//
// # Limits
//
// Nothing that a client or a process does grows the agent without bound: the
// number of processes, the size of a command, of the input that waits and of what
// is kept of the output are capped. The size of one message is for whoever mounts
// the service to cap. Locks: Service.mu and output.mu; neither is held
// while the other is taken, and nothing blocks under them.
package proc

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/process/processconnect"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/reap"
)

const (
	// maxStarting bounds the starts that wait for a file system at one time:
	// each takes a thread.
	maxStarting = 64
	// maxProcesses and minProcesses bound the number of processes by memory:
	// one per MiB. A process's log takes at most 192 KiB.
	maxProcesses = 1024
	minProcesses = 64
	// maxInput bounds what all callers together wait to write to processes that
	// do not read: the agent holds it in memory.
	maxInput = 32 << 20
	// closeLimit is how long Close waits for killed processes to be gone.
	closeLimit = 5 * time.Second
)

// Service implements [processconnect.ProcessHandler]. Make one with [New].
type Service struct {
	reaper   *reap.Reaper
	identity *identity.Store
	log      *slog.Logger
	trees    *trees
	limits   childLimits
	starting chan struct{} // capacity maxStarting

	work    sync.WaitGroup
	waiting atomic.Int64 // bytes of input in the hands of their writers

	mu        sync.Mutex
	closed    bool
	max       int
	reserved  int // processes and starts under way
	byPID     map[uint32]*proc
	byTag     map[string]*proc // nil value: being started
	lingering map[*tree]struct{}
	draining  []*source // oldest first
}

var _ processconnect.ProcessHandler = (*Service)(nil)

// New returns a Service that starts processes with reaper, which must be
// running, and takes defaults from store.
func New(reaper *reap.Reaper, store *identity.Store, log *slog.Logger) *Service {
	name := "agentiso"
	if pid := os.Getpid(); pid != 1 {
		name += "-" + strconv.Itoa(pid)
	}
	return &Service{
		reaper:    reaper,
		identity:  store,
		log:       log,
		trees:     newTrees(name, log),
		limits:    newChildLimits(log),
		starting:  make(chan struct{}, maxStarting),
		max:       processLimit(),
		byPID:     make(map[uint32]*proc),
		byTag:     make(map[string]*proc),
		lingering: make(map[*tree]struct{}),
	}
}

// Close kills everything that the service has started and that still runs, ends
// all streams, and waits (at most five seconds) until it is gone. No process
// is started any more.
func (s *Service) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	procs := make([]*proc, 0, len(s.byPID))
	for _, p := range s.byPID {
		procs = append(procs, p)
	}
	s.mu.Unlock()
	for _, p := range procs {
		p.kill()
		p.out.close()
	}
	done := make(chan struct{})
	go func() {
		s.work.Wait()
		close(done)
	}()
	var err error
	limit := time.NewTimer(closeLimit)
	defer limit.Stop()
	for waiting := true; waiting; {
		// Background processes of commands that have ended, and of those that
		// end meanwhile.
		s.killLingering()
		select {
		case <-done:
			waiting = false
		case <-limit.C:
			err = fmt.Errorf("close processes: some did not end within %v", closeLimit)
			waiting = false
		case <-time.After(50 * time.Millisecond):
		}
	}
	s.killLingering()
	s.mu.Lock()
	trees := s.lingering
	s.lingering = make(map[*tree]struct{})
	s.mu.Unlock()
	for tr := range trees {
		if !tr.emptyWithin(closeLimit) {
			err = errors.Join(err, errors.New("close processes: a background process did not end"))
		}
	}
	return errors.Join(err, s.trees.close())
}

// killLingering kills background processes of ended commands and closes what
// still drains their output.
func (s *Service) killLingering() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for tr := range s.lingering {
		if err := tr.kill(nil); err != nil {
			s.log.Warn("kill background processes", "err", err)
		}
	}
	for _, src := range s.draining {
		_ = src.file.Close()
	}
}

// reserve takes a place for one more process, and tag if it is not empty. The
// error is a Connect error.
func (s *Service) reserve(tag string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return connect.NewError(connect.CodeUnavailable, errOutputClosed)
	case s.reserved >= s.max:
		return connect.NewError(connect.CodeResourceExhausted,
			fmt.Errorf("%d processes are running, the most that this guest's agent follows at one time", s.reserved))
	}
	if tag != "" {
		if _, ok := s.byTag[tag]; ok {
			return connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("a process with tag %q is running", tag))
		}
		s.byTag[tag] = nil
	}
	s.reserved++
	return nil
}

// release gives back what reserve took.
func (s *Service) release(tag string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reserved--
	if tag != "" {
		delete(s.byTag, tag)
	}
}

// add publishes a started process and takes over its place. After Close it
// refuses: the caller kills the process.
func (s *Service) add(p *proc) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.byPID[p.pid] = p
	if p.tag != nil && *p.tag != "" {
		s.byTag[*p.tag] = p
	}
	s.work.Add(1 + len(p.sources))
	return true
}

// remove takes a process out of the lists: it has ended.
func (s *Service) remove(p *proc) {
	tag := ""
	if p.tag != nil {
		tag = *p.tag
	}
	s.mu.Lock()
	// The number may be another's already: the child was collected a while ago.
	if s.byPID[p.pid] == p {
		delete(s.byPID, p.pid)
	}
	s.mu.Unlock()
	s.release(tag)
}

// linger keeps the cgroup of a process that has ended, if others still live in
// it, and gives back those of earlier ones that have become empty.
func (s *Service) linger(tr *tree) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lingering[tr] = struct{}{}
	for tr := range s.lingering {
		if tr.remove() {
			delete(s.lingering, tr)
		}
	}
}

// maxDraining bounds the pipes that are kept open for background processes of
// commands that have ended. Beyond it the oldest is closed, and its writers
// get SIGPIPE.
const maxDraining = 512

// drainRest reads on behalf of background processes; see [source.discard].
func (s *Service) drainRest(src *source) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		_ = src.file.Close()
		return
	}
	if len(s.draining) >= maxDraining {
		_ = s.draining[0].file.Close()
		s.draining = append(s.draining[:0], s.draining[1:]...)
	}
	s.draining = append(s.draining, src)
	s.mu.Unlock()

	src.discard()
	_ = src.file.Close()

	s.mu.Lock()
	defer s.mu.Unlock()
	for i, d := range s.draining {
		if d == src {
			s.draining = append(s.draining[:i], s.draining[i+1:]...)
			break
		}
	}
}

// protect runs fn and turns a panic into a log line: the agent is PID 1, and
// its end would be the machine's.
func (s *Service) protect(what string, fn func()) {
	defer func() {
		if v := recover(); v != nil {
			s.log.Error(what+" panicked", "err", v, "stack", string(debug.Stack()))
		}
	}()
	fn()
}

// processLimit is one process per MiB of memory within bounds.
func processLimit() int {
	b, err := readLimited("/proc/meminfo", 4<<10)
	if err != nil {
		return minProcesses
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			f := strings.Fields(v)
			if len(f) == 0 {
				break
			}
			kib, err := strconv.Atoi(f[0])
			if err != nil {
				break
			}
			return min(max(kib>>10, minProcesses), maxProcesses)
		}
	}
	return minProcesses
}
