package proc

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/internal/guest/reap"
)

// proc is one process that Start has started, until its end event.
type proc struct {
	s       *Service
	child   *reap.Child
	pid     uint32
	tag     *string
	config  *process.ProcessConfig // what List shows
	out     *output
	in      *input   // nil without standard input
	master  *os.File // nil without a terminal
	sources []*source
	tree    *tree

	pumps   sync.WaitGroup
	overdue atomic.Bool   // its deadline killed it
	ended   chan struct{} // closed when the end event is in out
}

// run starts the goroutines that serve the process. add has counted them.
func (p *proc) run(deadline time.Time) {
	p.pumps.Add(len(p.sources))
	for _, src := range p.sources {
		go p.pump(src)
	}
	go p.s.protect("watch over a process", func() { p.watch(deadline) })
}

// pump moves one source's output until the end, and keeps the source open for
// those who inherited it.
func (p *proc) pump(src *source) {
	defer p.s.work.Done()
	eof := true
	p.s.protect("output of a process", func() { eof = src.pump(p.out) })
	if eof && src.kind == terminal {
		// Nobody has the terminal open, but the process can open it again by
		// name; closing the master would hang it up.
		<-p.child.Done()
	}
	p.pumps.Done()
	if eof || src.kind == terminal {
		_ = src.file.Close()
		return
	}
	p.s.protect("output of background processes", func() { p.s.drainRest(src) })
}

// watch waits for the process, kills its tree at the deadline (zero: none),
// and ends what belongs to it.
func (p *proc) watch(deadline time.Time) {
	defer p.s.work.Done()
	var timeout <-chan time.Time
	if !deadline.IsZero() {
		t := time.NewTimer(time.Until(deadline))
		defer t.Stop()
		timeout = t.C
	}
	select {
	case <-p.child.Done():
	case <-timeout:
		p.overdue.Store(true)
		p.kill()
		<-p.child.Done()
	}
	for _, src := range p.sources {
		src.exited()
	}
	if p.in != nil {
		p.in.exited()
	}
	p.pumps.Wait()
	p.s.remove(p)
	p.out.finish(p.endEvent())
	p.s.linger(p.tree)
	close(p.ended)
}

// kill kills everything that the process has started.
func (p *proc) kill() {
	if err := p.tree.kill(p.child); err != nil {
		p.s.log.Warn("kill process", "pid", p.pid, "err", err)
	}
}

// endEvent says how the process ended. error is set unless it exited with 0.
func (p *proc) endEvent() *process.ProcessEvent_EndEvent {
	ws, err := p.child.Wait()
	end := endOf(ws)
	switch {
	case err != nil:
		end = &process.ProcessEvent_EndEvent{ExitCode: -1, Status: "unknown", Error: proto.String(err.Error())}
	case p.overdue.Load():
		end.Error = proto.String(end.Status + " (deadline exceeded)")
	case end.ExitCode != 0:
		end.Error = proto.String(end.Status)
	}
	return end
}

// endOf words a wait status: "exit status 1"; "signal: killed" with exit code
// -1 and exited false.
func endOf(ws syscall.WaitStatus) *process.ProcessEvent_EndEvent {
	if ws.Signaled() {
		status := "signal: " + ws.Signal().String()
		if ws.CoreDump() {
			status += " (core dumped)"
		}
		return &process.ProcessEvent_EndEvent{ExitCode: -1, Status: status}
	}
	return &process.ProcessEvent_EndEvent{
		ExitCode: int32(ws.ExitStatus()),
		Exited:   true,
		Status:   fmt.Sprintf("exit status %d", ws.ExitStatus()),
	}
}

// shownBytes bounds what List shows, and the agent keeps, of one command.
const shownBytes = 16 << 10

// shown returns cfg as List shows it: long commands are cut.
func shown(cfg *process.ProcessConfig) *process.ProcessConfig {
	if proto.Size(cfg) <= shownBytes {
		return proto.CloneOf(cfg)
	}
	left := shownBytes
	cut := func(s string) string {
		s = truncate(s, left)
		left -= len(s)
		return s
	}
	c := &process.ProcessConfig{Cmd: cut(cfg.GetCmd())}
	if cfg.Cwd != nil {
		c.Cwd = proto.String(cut(cfg.GetCwd()))
	}
	for _, a := range cfg.GetArgs() {
		if left == 0 {
			break
		}
		c.Args = append(c.Args, cut(a))
	}
	return c
}

// truncate cuts s to at most n bytes between characters.
func truncate(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
