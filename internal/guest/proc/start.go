package proc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/users"
)

const (
	// startLimit bounds a fork and exec. A start that takes longer is given up
	// and its process killed when it comes.
	startLimit = 30 * time.Second
	// killedLimit is how long a call whose deadline has passed waits for the
	// process to be gone before it says so.
	killedLimit = 2 * time.Second
	// maxKeepalive bounds the Keepalive-Ping-Interval.
	maxKeepalive = time.Hour
)

// Start runs a process and streams its events; see the package comment. The
// errors before the start event are invalid_argument (the request, a missing
// cwd), not_found (no such program), permission_denied, unauthenticated (no
// such user), already_exists (the tag), resource_exhausted.
func (s *Service) Start(ctx context.Context, req *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse]) error {
	p, r, err := s.start(ctx, req.Msg)
	if err != nil {
		return err
	}
	defer p.out.detach(r, context.Canceled)
	send := func(ev *process.ProcessEvent) error { return stream.Send(&process.StartResponse{Event: ev}) }
	if err := send(startEvent(p.pid)); err != nil {
		return err
	}
	err = r.follow(ctx, keepalive(req.Header().Get), send)
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil {
		t := time.NewTimer(killedLimit)
		defer t.Stop()
		select {
		case <-p.ended:
		case <-t.C:
		}
		return connect.NewError(connect.CodeDeadlineExceeded, fmt.Errorf("process %d was killed: the request's deadline has passed", p.pid))
	}
	return streamError(err)
}

// start starts the process of req and attaches a reader to it.
func (s *Service) start(ctx context.Context, req *process.StartRequest) (*proc, *reader, error) {
	id := s.identity.Current()
	u, err := caller(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	if len(req.GetTag()) > maxTag {
		return nil, nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("tag is longer than %d bytes", maxTag))
	}
	size, err := ptySize(req.GetPty())
	if err != nil {
		return nil, nil, err
	}
	cmd, err := compose(req.GetProcess(), u, id, req.GetPty() != nil)
	if err != nil {
		return nil, nil, err
	}
	if err := s.reserve(req.GetTag()); err != nil {
		return nil, nil, err
	}
	if err := s.resolve(ctx, cmd); err != nil {
		s.release(req.GetTag())
		return nil, nil, err
	}
	return s.spawnWithin(ctx, cmd, req, size)
}

// resolve looks the command up, with a bound on how many do at a time.
func (s *Service) resolve(ctx context.Context, cmd *command) error {
	t := time.NewTimer(resolveLimit)
	defer t.Stop()
	select {
	case s.starting <- struct{}{}:
	case <-ctx.Done():
		return streamError(ctx.Err())
	case <-t.C:
		return connect.NewError(connect.CodeUnavailable,
			fmt.Errorf("%d starts wait for a file system that does not answer", maxStarting))
	}
	return cmd.resolve(ctx, func() { <-s.starting })
}

// spawnWithin is spawn bounded by startLimit and ctx's deadline. A client that
// goes away meanwhile does not stop it: the process may be running.
func (s *Service) spawnWithin(ctx context.Context, cmd *command, req *process.StartRequest, size *unix.Winsize) (*proc, *reader, error) {
	if err := ctx.Err(); err != nil {
		s.release(req.GetTag())
		return nil, nil, streamError(err)
	}
	deadline, _ := ctx.Deadline()
	limit := startLimit
	if !deadline.IsZero() {
		limit = min(limit, time.Until(deadline))
	}
	type result struct {
		p   *proc
		r   *reader
		err error
	}
	done := make(chan result)
	abandoned := make(chan struct{})
	go s.protect("start of a process", func() {
		var res result
		res.p, res.r, res.err = s.spawn(cmd, req, size, deadline)
		select {
		case done <- res:
		case <-abandoned:
			if res.err == nil {
				res.p.kill()
				res.p.out.detach(res.r, context.Canceled)
			}
		}
	})
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case res := <-done:
		return res.p, res.r, res.err
	case <-t.C:
		close(abandoned)
		return nil, nil, connect.NewError(connect.CodeDeadlineExceeded,
			fmt.Errorf("start %s: not started within %v", cmd.path, limit))
	}
}

// spawn starts the process with everything that belongs to it. It takes over
// the caller's reservation.
func (s *Service) spawn(cmd *command, req *process.StartRequest, size *unix.Winsize, deadline time.Time) (_ *proc, _ *reader, err error) {
	p := &proc{s: s, tag: req.Tag, config: shown(req.GetProcess()), out: newOutput(), ended: make(chan struct{})}
	var files streams
	started := false
	defer func() {
		files.closeChild()
		if err != nil && !started {
			files.closeAgent()
			if p.tree != nil {
				p.tree.started()
				p.tree.remove()
			}
			s.release(req.GetTag())
		}
	}()
	if err := files.open(cmd.user, size, req.GetStdin() || req.Stdin == nil); err != nil {
		return nil, nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("start %s: %w", cmd.path, err))
	}
	for _, f := range files.outputs() {
		src, err := newSource(f.file, f.kind)
		if err != nil {
			return nil, nil, connect.NewError(connect.CodeInternal, fmt.Errorf("start %s: %w", cmd.path, err))
		}
		p.sources = append(p.sources, src)
	}
	p.master = files.master
	switch {
	case files.master != nil:
		p.in = newInput(files.master, true)
	case files.stdin[1] != nil:
		p.in = newInput(files.stdin[1], false)
	}
	p.tree = s.trees.open()
	ec := cmd.exec(files)
	p.tree.place(ec.SysProcAttr)
	r, err := p.out.attach(false)
	if err != nil {
		return nil, nil, err
	}
	if p.child, err = s.reaper.Start(ec); err != nil {
		return nil, nil, cmd.execError(err)
	}
	p.tree.started()
	p.pid = uint32(p.child.PID())
	s.limits.apply(p.child, p.tree)
	if !s.add(p) {
		p.kill()
		return nil, nil, connect.NewError(connect.CodeUnavailable, errOutputClosed)
	}
	started = true
	p.run(deadline)
	return p, r, nil
}

// exec makes the os/exec command.
func (c *command) exec(f streams) *exec.Cmd {
	attr := &syscall.SysProcAttr{}
	if f.master != nil {
		attr.Setctty, attr.Ctty = true, 0
		attr.Setsid = true // the reaper does so for all; Setctty wants to see it
	}
	if os.Geteuid() == 0 {
		attr.Credential = &syscall.Credential{Uid: c.user.UID, Gid: c.user.GID, Groups: c.user.Groups}
	}
	return &exec.Cmd{
		Path: c.path, Args: c.argv, Env: append(c.env, "PWD="+c.dir), Dir: c.dir,
		Stdin: f.child[0], Stdout: f.child[1], Stderr: f.child[2],
		SysProcAttr: attr,
	}
}

// caller returns the user of a call: the one it names, or the default.
func caller(ctx context.Context, id identity.Snapshot) (users.User, error) {
	if u, ok := users.FromContext(ctx); ok {
		return u, nil
	}
	u, err := users.Lookup(id.DefaultUser)
	switch {
	case errors.Is(err, users.ErrUnknown):
		return u, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("default user %q does not exist in this guest", id.DefaultUser))
	case err != nil:
		return u, connect.NewError(connect.CodeInternal, err)
	}
	return u, nil
}

// ptySize returns nil without a terminal.
func ptySize(pty *process.PTY) (*unix.Winsize, error) {
	if pty == nil {
		return nil, nil
	}
	if pty.GetSize() == nil {
		return &unix.Winsize{Col: defaultColumns, Row: defaultRows}, nil
	}
	cols, rows := pty.GetSize().GetCols(), pty.GetSize().GetRows()
	if cols > math.MaxUint16 || rows > math.MaxUint16 {
		return nil, connect.NewError(connect.CodeInvalidArgument,
			fmt.Errorf("pty.size: %d columns and %d rows are more than %d", cols, rows, math.MaxUint16))
	}
	return &unix.Winsize{Col: uint16(cols), Row: uint16(rows)}, nil
}

// keepalive reads the interval from a streaming call's header; 0 is none.
func keepalive(header func(string) string) time.Duration {
	n, err := strconv.ParseUint(header("Keepalive-Ping-Interval"), 10, 31)
	if err != nil {
		return 0
	}
	return min(time.Duration(n)*time.Second, maxKeepalive)
}

// streamError gives the end of a stream its Connect code.
func streamError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errSlowReader), errors.Is(err, errTooManyReaders):
		return connect.NewError(connect.CodeResourceExhausted, err)
	case errors.Is(err, errOutputClosed):
		return connect.NewError(connect.CodeUnavailable, err)
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	return err
}

func startEvent(pid uint32) *process.ProcessEvent {
	return &process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: pid}}}
}
