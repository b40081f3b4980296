package proc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/process"
)

// replayHeader on Connect asks for the latest output before what comes; its
// value is "tail".
const replayHeader = "Agentiso-Replay"

// List returns the processes that have not ended, in the order of their
// numbers. Commands longer than 16 KiB are cut.
func (s *Service) List(context.Context, *connect.Request[process.ListRequest]) (*connect.Response[process.ListResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*process.ProcessInfo, 0, len(s.byPID))
	for _, p := range s.byPID {
		list = append(list, &process.ProcessInfo{Config: p.config, Pid: p.pid, Tag: p.tag})
	}
	slices.SortFunc(list, func(a, b *process.ProcessInfo) int { return cmp.Compare(a.Pid, b.Pid) })
	return connect.NewResponse(&process.ListResponse{Processes: list}), nil
}

// Connect attaches to a running process: a start event, what it writes from
// then on, and its end. A deadline ends the call and not the process.
func (s *Service) Connect(ctx context.Context, req *connect.Request[process.ConnectRequest], stream *connect.ServerStream[process.ConnectResponse]) error {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return err
	}
	r, err := p.out.attach(req.Header().Get(replayHeader) == "tail")
	if err != nil {
		return streamError(err)
	}
	defer p.out.detach(r, context.Canceled)
	send := func(ev *process.ProcessEvent) error { return stream.Send(&process.ConnectResponse{Event: ev}) }
	if err := send(startEvent(p.pid)); err != nil {
		return err
	}
	return streamError(r.follow(ctx, keepalive(req.Header().Get), send))
}

// Update resizes the terminal of a process.
func (s *Service) Update(_ context.Context, req *connect.Request[process.UpdateRequest]) (*connect.Response[process.UpdateResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if req.Msg.GetPty() == nil {
		return connect.NewResponse(&process.UpdateResponse{}), nil
	}
	if req.Msg.GetPty().GetSize() == nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("pty has no size"))
	}
	size, err := ptySize(req.Msg.GetPty())
	if err != nil {
		return nil, err
	}
	if p.master == nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d has no terminal", p.pid))
	}
	if err := setSize(p.master, size.Col, size.Row); err != nil {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("resize terminal of process %d: %w", p.pid, err))
	}
	return connect.NewResponse(&process.UpdateResponse{}), nil
}

// StreamInput writes the stream's inputs in order. The answer comes when the
// stream has ended and everything is written.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[process.StreamInputRequest]) (*connect.Response[process.StreamInputResponse], error) {
	var p *proc
	for stream.Receive() {
		switch ev := stream.Msg().GetEvent().(type) {
		case *process.StreamInputRequest_Start:
			if p != nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("a second start event"))
			}
			var err error
			if p, err = s.find(ev.Start.GetProcess()); err != nil {
				return nil, err
			}
		case *process.StreamInputRequest_Data:
			if p == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the first event must be start"))
			}
			if err := p.write(ctx, ev.Data.GetInput()); err != nil {
				return nil, err
			}
		case *process.StreamInputRequest_Keepalive:
		default:
			return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("an event of no known kind"))
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&process.StreamInputResponse{}), nil
}

// SendInput writes one input. It returns when all of it is written: a process
// that does not read blocks the call.
func (s *Service) SendInput(ctx context.Context, req *connect.Request[process.SendInputRequest]) (*connect.Response[process.SendInputResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if err := p.write(ctx, req.Msg.GetInput()); err != nil {
		return nil, err
	}
	return connect.NewResponse(&process.SendInputResponse{}), nil
}

// SendSignal sends SIGTERM to the process's group, or kills everything that it
// has started.
func (s *Service) SendSignal(_ context.Context, req *connect.Request[process.SendSignalRequest]) (*connect.Response[process.SendSignalResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	switch req.Msg.GetSignal() {
	case process.Signal_SIGNAL_SIGTERM:
		// The process may have ended a moment ago; its end event tells.
		_ = p.child.SignalGroup(syscall.SIGTERM)
	case process.Signal_SIGNAL_SIGKILL:
		p.kill()
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument,
			fmt.Errorf("signal %d: only SIGTERM (15) and SIGKILL (9) can be sent", req.Msg.GetSignal()))
	}
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}

// CloseStdin ends the standard input: an end of file on a pipe, Ctrl-D on a
// terminal.
func (s *Service) CloseStdin(ctx context.Context, req *connect.Request[process.CloseStdinRequest]) (*connect.Response[process.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	if p.in == nil {
		return nil, p.inputError(errNoInput)
	}
	if err := p.in.end(ctx); err != nil {
		return nil, p.inputError(err)
	}
	return connect.NewResponse(&process.CloseStdinResponse{}), nil
}

// find returns the running process that sel names.
func (s *Service) find(sel *process.ProcessSelector) (*proc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch sel := sel.GetSelector().(type) {
	case *process.ProcessSelector_Pid:
		if p := s.byPID[sel.Pid]; p != nil {
			return p, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no process with pid %d is running", sel.Pid))
	case *process.ProcessSelector_Tag:
		if p := s.byTag[sel.Tag]; p != nil {
			return p, nil
		}
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no process with tag %.64q is running", sel.Tag))
	}
	return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("process: neither pid nor tag is given"))
}

// write writes one input of a request.
func (p *proc) write(ctx context.Context, in *process.ProcessInput) error {
	var b []byte
	terminal := false
	switch in := in.GetInput().(type) {
	case *process.ProcessInput_Stdin:
		b = in.Stdin
	case *process.ProcessInput_Pty:
		b, terminal = in.Pty, true
	default:
		return connect.NewError(connect.CodeInvalidArgument, errors.New("input: neither stdin nor pty is given"))
	}
	switch {
	case terminal && p.master == nil:
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d has no terminal: send stdin", p.pid))
	case !terminal && p.master != nil:
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("process %d has a terminal: send pty", p.pid))
	case p.in == nil:
		return p.inputError(errNoInput)
	}
	// One caller is always let through, whatever the size.
	n := int64(len(b))
	defer p.s.waiting.Add(-n)
	if all := p.s.waiting.Add(n); all > maxInput && all > n {
		return connect.NewError(connect.CodeResourceExhausted,
			fmt.Errorf("process %d: more than %d bytes of input wait for processes that do not read", p.pid, maxInput))
	}
	if err := p.in.write(ctx, b); err != nil {
		return p.inputError(err)
	}
	return nil
}

func (p *proc) inputError(err error) error {
	code := connect.CodeFailedPrecondition
	switch {
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case errors.Is(err, errInputClosed), errors.Is(err, errBrokenPipe), errors.Is(err, errNoInput):
	default:
		code = connect.CodeInternal
	}
	return connect.NewError(code, fmt.Errorf("process %d: %w", p.pid, err))
}
