package qemu

import (
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/qemu/qmp"
)

const (
	// drainLimit bounds how long the last output and events of an ended
	// process are waited for: they are in the host's socket buffers.
	drainLimit = 2 * time.Second
	// redialMin and redialMax bound the pause between attempts to reach a live
	// QEMU again.
	redialMin = 200 * time.Millisecond
	redialMax = 10 * time.Second
	// resumeEvery is how often a guest that waits for disk space is let go to
	// try again.
	resumeEvery = 5 * time.Second
)

// A machine is one QEMU process and what reads from it: its monitor for events,
// its console. It reaches its end once: over is true when exit is set.
type machine struct {
	id      string
	proc    domain.Process
	dir     runDir
	con     *console
	log     *slog.Logger
	retry   time.Duration      // for a guest that waits for disk space
	release context.CancelFunc // lets go of the process

	gone   chan struct{} // closed when the process has ended
	done   chan struct{} // closed when exit is set
	exit   domain.Exit
	killed atomic.Bool

	h *handle

	mu       sync.Mutex
	shutdown string // the reason QEMU gave for its end
	held     string // why the guest is held
}

func (o *Owner) newMachine(id string, p domain.Process, h *handle, con *console) *machine {
	return &machine{
		id: id, proc: p, h: h, con: con, dir: runDir(p.RunDir), log: o.log.With("workspace", id), retry: o.opts.resumeEvery,
		gone: make(chan struct{}), done: make(chan struct{}),
	}
}

func (m *machine) over() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// run looks after the machine until its process has ended or ctx is done; then
// it lets go of it.
func (m *machine) run(ctx context.Context, r *running) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer m.con.end()
	var readers sync.WaitGroup
	readers.Go(func() { m.readConsole(ctx, r.console) })
	readers.Go(func() { m.readEvents(ctx, r.qmp, r.events) })

	stop := context.AfterFunc(ctx, m.h.close)
	err := m.h.wait()
	if !stop() || err != nil {
		cancel()
		readers.Wait()
		return
	}
	close(m.gone)
	limit := time.AfterFunc(drainLimit, cancel)
	readers.Wait()
	limit.Stop()

	ws, ours := m.h.reap()
	m.h.close()
	m.exit = domain.Exit{At: time.Now()}
	m.exit.Reason, m.exit.Clean = m.reason(ws, ours)
	close(m.done)
}

// kill ends the process and waits until the machine is over.
func (m *machine) kill(ctx context.Context) error {
	select {
	case <-m.gone:
	default:
		m.killed.Store(true)
		if err := m.h.kill(); err != nil && !m.over() {
			select {
			case <-m.gone: // it ended by itself, and the handle with it
			default:
				return err
			}
		}
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return stuck(m.proc.PID, ctx.Err())
	}
}

// pause waits before the next attempt; false if there is nothing to attempt
// any more.
func (m *machine) pause(ctx context.Context, wait *time.Duration) bool {
	t := time.NewTimer(*wait)
	defer t.Stop()
	*wait = min(2**wait, redialMax)
	select {
	case <-t.C:
		return true
	case <-m.gone:
	case <-ctx.Done():
	}
	return false
}

// readConsole keeps what the guest prints. Without a reader QEMU throws it
// away; with one that does not read, the guest would wait. So nothing but the
// write to the host's page cache is between two reads.
func (m *machine) readConsole(ctx context.Context, conn net.Conn) {
	wait := redialMin
	buf := make([]byte, 32<<10)
	for {
		if conn == nil {
			c, err := (&net.Dialer{}).DialContext(ctx, "unix", m.dir.path(consoleSocket))
			if err != nil {
				if !m.pause(ctx, &wait) {
					return
				}
				continue
			}
			conn = c
		}
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		for {
			n, err := conn.Read(buf)
			if n > 0 {
				wait = redialMin
				if _, err := m.con.Write(buf[:n]); err != nil {
					m.log.Warn("console output is lost", "err", err)
				}
			}
			if err != nil {
				break
			}
		}
		stop()
		conn.Close()
		conn = nil
		if !m.pause(ctx, &wait) {
			return
		}
	}
}

// readEvents follows what QEMU says of the machine, and lets a guest go on
// that waits for space on the host's disk.
func (m *machine) readEvents(ctx context.Context, c *qmp.Client, events *qmp.Subscription) {
	wait := redialMin
	for {
		if c == nil {
			var err error
			c, err = qmp.Dial(ctx, m.dir.path(qmpSocket), qmp.Options{})
			if err != nil {
				if wait == redialMax {
					m.log.Warn("reach QEMU", "err", err)
				}
				if !m.pause(ctx, &wait) {
					return
				}
				continue
			}
			events = c.Subscribe(16, watched...)
			m.resume(ctx, c, false)
		}
		wait = redialMin
		m.follow(ctx, c, events)
		c.Close()
		c = nil
		if !m.pause(ctx, &wait) {
			return
		}
	}
}

// follow handles events until the connection or ctx ends.
func (m *machine) follow(ctx context.Context, c *qmp.Client, events *qmp.Subscription) {
	retry := time.NewTicker(m.retry)
	defer retry.Stop()
	tried := false // to let the guest go on; whether it does, is seen a moment later
	for {
		select {
		case e, ok := <-events.Events():
			if !ok {
				return
			}
			m.handle(e)
		case <-retry.C:
			next := m.retry
			if m.heldReason() != "" {
				if tried = m.resume(ctx, c, !tried); tried {
					next = min(m.retry, settleTime)
				}
			}
			retry.Reset(next)
		case <-ctx.Done():
			return
		}
	}
}

func (m *machine) handle(e qmp.Event) {
	var d struct {
		Reason  string `json:"reason"`  // SHUTDOWN
		Action  string `json:"action"`  // BLOCK_IO_ERROR, GUEST_PANICKED
		NoSpace bool   `json:"nospace"` // BLOCK_IO_ERROR
	}
	if err := json.Unmarshal(e.Data, &d); err != nil {
		m.log.Warn("event from QEMU", "event", e.Name, "err", err)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case e.Name == "SHUTDOWN":
		m.shutdown = d.Reason
	case e.Name == "GUEST_PANICKED" && m.shutdown == "":
		m.shutdown = "guest-panic"
	case e.Name == "BLOCK_IO_ERROR" && d.Action == "stop" && m.held == "":
		m.held = "the host's disk is full"
		m.log.Error("guest is held: no space for its disk on the host")
	}
}

// settleTime is long enough for a guest that was let go to fail again: the
// write that it is held for is the first thing that it does.
const settleTime = 100 * time.Millisecond

// resume finds out whether the guest is held by a failed write and, if try is
// set, lets it write again and returns true. A guest that was stopped for
// another reason is left alone.
func (m *machine) resume(ctx context.Context, c *qmp.Client, try bool) bool {
	var status struct {
		Status string `json:"status"`
	}
	if err := c.Do(ctx, "query-status", nil, &status); err != nil {
		return false // the connection's end is seen by follow
	}
	held := ""
	if status.Status == "io-error" {
		held = "the host's disk is full"
	}
	m.mu.Lock()
	m.held = held
	m.mu.Unlock()
	if held == "" || !try {
		return false
	}
	if err := c.Do(ctx, "cont", nil, nil); err != nil {
		m.log.Warn("let guest write again", "err", err)
		return false
	}
	return true
}

func (m *machine) heldReason() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// reason says how the machine ended; ws counts if the process was our child.
func (m *machine) reason(ws syscall.WaitStatus, ours bool) (reason string, clean bool) {
	m.mu.Lock()
	shutdown := m.shutdown
	m.mu.Unlock()
	var tail []byte
	if shutdown == "guest-reset" || shutdown == "guest-panic" {
		tail = m.con.lastOutput(panicWindow)
	}
	return exitReason(shutdown, m.killed.Load(), ws, ours, tail, m.dir.lastWords())
}
