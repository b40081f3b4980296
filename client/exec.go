package client

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/api/process/processconnect"
)

// Errors of starting a program, to be found with errors.Is: what a shell would
// say with 127 and 126.
var (
	ErrProgramNotFound      = errors.New("program not found")
	ErrProgramNotExecutable = errors.New("program cannot be executed")
)

// ExecOptions say how to run a command; the zero value runs it without input,
// discards its output, and leaves user, directory and environment to the
// workspace.
type ExecOptions struct {
	// Stdin is read to its end, never further ahead than the command reads.
	// nil: the command gets an empty input. When the command ends first, a Read
	// under way is left to end by itself.
	Stdin io.Reader
	// Stdout and Stderr receive what the command prints; nil discards. A slow
	// writer slows the command. They are written to by one goroutine.
	Stdout, Stderr io.Writer
	// TTY, when set, gives the command a terminal. Its output comes on Stdout.
	TTY *TTY

	User    string
	Workdir string
	Env     map[string]string // added to the workspace's
	// Timeout ends the command's whole process group; 0: none.
	Timeout time.Duration
}

// TTY describes a terminal.
type TTY struct {
	Size Size
	// Resize, when set, delivers new sizes until it is closed or the command
	// ends.
	Resize <-chan Size
}

// Size of a terminal in characters.
type Size struct{ Cols, Rows uint16 }

// Process is a command running in a workspace. Wait must be called.
type Process struct {
	PID int

	c      *Client
	rpc    processconnect.ProcessClient
	user   string
	o      ExecOptions
	ctx    context.Context // the stream's life, which Wait ends
	cancel context.CancelFunc
	limit  time.Time // when Timeout strikes; zero without one
	stream *connect.ServerStreamForClient[process.StartResponse]

	input sync.WaitGroup // resizes

	mu       sync.Mutex
	turn     *sync.Cond
	reading  bool // Stdin.Read is under way
	pumped   bool // the pump has ended
	stdinErr error
}

// Exec runs a command in a running workspace to its end and returns its exit
// code: 128+N when signal N ended it. The end of ctx kills it. An error means
// that there is no exit code.
func (c *Client) Exec(ctx context.Context, ref string, argv []string, o ExecOptions) (exit int, err error) {
	p, err := c.StartProcess(ctx, ref, argv, o)
	if err != nil {
		return 0, err
	}
	return p.Wait()
}

// StartProcess starts a command and returns once it runs. The end of ctx kills
// it.
func (c *Client) StartProcess(ctx context.Context, ref string, argv []string, o ExecOptions) (*Process, error) {
	if len(argv) == 0 {
		return nil, invalid("Give a command.", "there is no command to run")
	}
	p := &Process{c: c, user: o.User, o: o}
	p.turn = sync.NewCond(&p.mu)
	if o.Timeout > 0 {
		p.limit = time.Now().Add(o.Timeout)
		p.ctx, p.cancel = context.WithDeadline(ctx, p.limit)
	} else {
		p.ctx, p.cancel = context.WithCancel(ctx)
	}
	stdin := o.Stdin != nil
	tag := "agentiso-" + rand.Text()
	msg := &process.StartRequest{Process: &process.ProcessConfig{Cmd: argv[0], Args: argv[1:], Envs: o.Env}, Stdin: &stdin, Tag: &tag}
	if o.Workdir != "" {
		msg.Process.Cwd = &o.Workdir
	}
	if o.TTY != nil {
		msg.Pty = ptyOf(o.TTY.Size)
	}
	req := connect.NewRequest(msg)
	asUser(req.Header(), o.User)
	stream, err := c.processes(ref).Start(p.ctx, req)
	if err == nil && !stream.Receive() {
		err = stream.Err()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		_ = stream.Close()
	}
	p.rpc = c.processes(ref)
	if err != nil {
		if p.ctx.Err() != nil {
			// It may have started all the same: its tag finds it.
			p.killOrphan(&process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: tag}})
		}
		p.cancel()
		return nil, p.startError(argv[0], c.failed(ctx, "starting "+argv[0]+" in "+ref, err))
	}
	start := stream.Msg().GetEvent().GetStart()
	if start == nil {
		p.cancel()
		_ = stream.Close()
		return nil, &Error{Kind: Internal, Message: "the agent of " + ref + " did not begin with a start event", Next: "Destroy the workspace: its agent does not keep to the protocol."}
	}
	p.PID = int(start.GetPid())
	p.stream = stream
	if id := stream.ResponseHeader().Get(workspaceHeader); id != "" {
		ref = id // stays over a rename
	}
	p.rpc = c.processes(ref)
	if o.Stdin != nil {
		go p.pump()
	} else {
		p.pumped = true
	}
	if o.TTY != nil && o.TTY.Resize != nil {
		p.input.Go(p.resizes)
	}
	return p, nil
}

func ptyOf(s Size) *process.PTY {
	return &process.PTY{Size: &process.PTY_Size{Cols: uint32(s.Cols), Rows: uint32(s.Rows)}}
}

// startError marks the errors of execve.
func (p *Process) startError(program string, err error) error {
	e, ok := errors.AsType[*Error](err)
	if !ok || !e.Guest {
		return err
	}
	switch connect.CodeOf(e.Err) {
	case connect.CodeNotFound:
		e.Err = errors.Join(ErrProgramNotFound, e.Err)
		e.Next = "Check its spelling, or install it in the workspace or its image."
	case connect.CodePermissionDenied, connect.CodeInvalidArgument:
		e.Err = errors.Join(ErrProgramNotExecutable, e.Err)
		e.Next = "Check that " + program + " is a program that this user may execute, and the directory it shall run in."
	case connect.CodeUnauthenticated:
		e.Next = "Name a user that the image has."
	}
	return e
}

func (p *Process) selector() *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: uint32(p.PID)}}
}

func request[T any](p *Process, m *T) *connect.Request[T] {
	r := connect.NewRequest(m)
	asUser(r.Header(), p.user)
	return r
}

// Kill ends the command at once.
func (p *Process) Kill(ctx context.Context) error {
	return p.signal(ctx, p.selector(), process.Signal_SIGNAL_SIGKILL)
}

// Terminate asks the command to end (SIGTERM).
func (p *Process) Terminate(ctx context.Context) error {
	return p.signal(ctx, p.selector(), process.Signal_SIGNAL_SIGTERM)
}

func (p *Process) signal(ctx context.Context, which *process.ProcessSelector, s process.Signal) error {
	_, err := p.rpc.SendSignal(ctx, request(p, &process.SendSignalRequest{Process: which, Signal: s}))
	if connect.CodeOf(err) == connect.CodeNotFound && connect.IsWireError(err) {
		return nil // it has ended
	}
	return p.c.failed(ctx, "signalling a command", err)
}

// killTimeout bounds the kill of a command whose caller has gone.
const killTimeout = 2 * time.Second

// killOrphan kills a command that nobody waits for any more.
func (p *Process) killOrphan(which *process.ProcessSelector) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), killTimeout)
	defer cancel()
	_ = p.signal(ctx, which, process.Signal_SIGNAL_SIGKILL) // the daemon may be what is gone
}

// Wait passes the command's output on until it ends, and returns its exit code
// as [Client.Exec] does.
func (p *Process) Wait() (exit int, err error) {
	end, err := p.output()
	interrupted := p.ctx.Err() != nil
	if end == nil && (interrupted || errors.As(err, new(*writeError))) {
		p.killOrphan(p.selector())
	}
	late := p.late(end, err)
	p.cancel()
	_ = p.stream.Close()
	p.input.Wait()
	stdinErr := p.finishInput()
	switch {
	case stdinErr != nil && end == nil:
		return 0, stdinErr
	case late:
		return 0, &Error{Kind: Timeout, Message: "the command was killed: it took longer than " + p.o.Timeout.String(), Next: "Allow it more time.", Err: context.DeadlineExceeded}
	case end == nil:
		return 0, err
	case !end.GetExited() && !strings.HasPrefix(end.GetStatus(), signalStatus):
		return 0, &Error{Kind: Internal, Message: "how the command ended could not be learned: " + end.GetError(), Guest: true}
	}
	return exitCode(end), nil
}

// late reports whether the command ended by its time limit: by ours, or by the
// agent's, which counts the same time and says so in the end event.
func (p *Process) late(end *process.ProcessEvent_EndEvent, err error) bool {
	if p.limit.IsZero() {
		return false
	}
	if end == nil {
		return errors.Is(p.ctx.Err(), context.DeadlineExceeded) || KindOf(err) == Timeout
	}
	return strings.HasSuffix(end.GetError(), "(deadline exceeded)")
}

// writeError is the failure of the caller's Stdout or Stderr.
type writeError struct{ error }

func (e *writeError) Unwrap() error { return e.error }

// output passes data on until the end event, which is nil with an error.
func (p *Process) output() (*process.ProcessEvent_EndEvent, error) {
	for p.stream.Receive() {
		event := p.stream.Msg().GetEvent()
		var w io.Writer
		var b []byte
		switch {
		case event.GetEnd() != nil:
			return event.GetEnd(), nil
		case event.GetData().GetPty() != nil:
			w, b = p.o.Stdout, event.GetData().GetPty()
		case event.GetData().GetStdout() != nil:
			w, b = p.o.Stdout, event.GetData().GetStdout()
		case event.GetData().GetStderr() != nil:
			w, b = p.o.Stderr, event.GetData().GetStderr()
		}
		if w == nil || len(b) == 0 {
			continue
		}
		if _, err := w.Write(b); err != nil {
			return nil, &writeError{err}
		}
	}
	err := p.stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return nil, p.c.failed(p.ctx, "running a command", err)
}

// signalStatus begins the status of a command that a signal ended; the signal's
// name as Go's syscall.Signal has it follows.
const signalStatus = "signal: "

// exitCode is what a shell would make of the end.
func exitCode(end *process.ProcessEvent_EndEvent) int {
	if end.GetExited() {
		return int(end.GetExitCode())
	}
	name := strings.TrimPrefix(end.GetStatus(), signalStatus)
	name = strings.TrimSuffix(name, " (core dumped)")
	const highest = 64
	for n := syscall.Signal(1); n <= highest; n++ {
		if n.String() == name {
			return 128 + int(n)
		}
	}
	return 128 + int(syscall.SIGKILL)
}

// resizes passes the terminal's sizes on.
func (p *Process) resizes() {
	for {
		select {
		case <-p.ctx.Done():
			return
		case size, ok := <-p.o.TTY.Resize:
			if !ok {
				return
			}
			// A size that did not arrive is followed by another.
			_, _ = p.rpc.Update(p.ctx, request(p, &process.UpdateRequest{Process: p.selector(), Pty: ptyOf(size)}))
		}
	}
}

// workspaceHeader on an agent's answer is its workspace's id.
const workspaceHeader = "Agentiso-Workspace"

// inputBlock is how much is read of Stdin at a time.
const inputBlock = 32 << 10

// pump sends Stdin to the command. What fails here, but for Stdin itself,
// shows in the output stream too.
func (p *Process) pump() {
	defer func() {
		p.mu.Lock()
		p.pumped = true
		p.turn.Broadcast()
		p.mu.Unlock()
	}()
	stream := p.rpc.StreamInput(p.ctx)
	asUser(stream.RequestHeader(), p.user)
	err := stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{
		Start: &process.StreamInputRequest_StartEvent{Process: p.selector()},
	}})
	buf := make([]byte, inputBlock)
	for err == nil {
		n, rerr := p.read(buf)
		if p.ctx.Err() != nil {
			break
		}
		if n > 0 {
			err = stream.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{
				Data: &process.StreamInputRequest_DataEvent{Input: p.inputOf(buf[:n])},
			}})
		}
		if rerr != nil && rerr != io.EOF { //nolint:errorlint // io.Reader's contract
			p.mu.Lock()
			p.stdinErr = &Error{Kind: Internal, Message: "reading the input: " + rerr.Error(), Err: rerr}
			p.mu.Unlock()
			p.cancel() // the command must not take what it has for all
			break
		}
		if rerr != nil {
			break
		}
	}
	if _, cerr := stream.CloseAndReceive(); err == nil && cerr == nil {
		_, _ = p.rpc.CloseStdin(p.ctx, request(p, &process.CloseStdinRequest{Process: p.selector()}))
	}
}

func (p *Process) inputOf(b []byte) *process.ProcessInput {
	if p.o.TTY != nil {
		return &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: b}}
	}
	return &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: b}}
}

// read marks that the caller's Read, which nobody can end, is under way.
func (p *Process) read(b []byte) (int, error) {
	p.mu.Lock()
	p.reading = true
	p.turn.Broadcast()
	p.mu.Unlock()
	n, err := p.o.Stdin.Read(b)
	p.mu.Lock()
	p.reading = false
	p.mu.Unlock()
	return n, err
}

// finishInput waits for the pump, unless Stdin holds it, and returns how Stdin
// failed.
func (p *Process) finishInput() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.pumped && !p.reading {
		p.turn.Wait()
	}
	return p.stdinErr
}
