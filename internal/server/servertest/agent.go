package servertest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/api/process/processconnect"
)

// Agent is a small agent: a process service whose programs are functions, and
// a TCP stream that answers each line. Programs:
//
//	echo A…     prints its arguments      err A…      the same on stderr
//	exit N      exits with N              signal NAME is ended by that signal
//	cat         copies input to output    count       prints how long its input is
//	yes         prints without end        sleep       runs until it is killed
//	env K       prints a variable         whoami      prints its user and directory
//	size        prints its terminal's size, at first and at each change, until input ends
//	early       exits while its input is still open
type Agent struct {
	processconnect.UnimplementedProcessHandler

	// Printed counts what yes was able to send.
	Printed atomic.Int64
	// Killed counts SIGKILLs.
	Killed atomic.Int64

	mux *http.ServeMux

	mu    sync.Mutex
	next  uint32
	procs map[uint32]*proc
}

type proc struct {
	tag    string
	stdinR *io.PipeReader
	stdinW *io.PipeWriter
	sizes  chan string
	killed chan struct{}
	once   sync.Once
}

func (p *proc) kill() {
	p.once.Do(func() { close(p.killed) })
	_ = p.stdinR.CloseWithError(io.ErrClosedPipe)
}

// NewAgent returns an Agent.
func NewAgent() *Agent {
	a := &Agent{mux: http.NewServeMux(), procs: map[uint32]*proc{}, next: 100}
	a.mux.Handle(processconnect.NewProcessHandler(a, connect.WithCompressMinBytes(math.MaxInt)))
	a.mux.HandleFunc("GET /envs", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"A":"b"}`) })
	a.mux.HandleFunc("GET /agentiso.guest.v1.Guest/Connect", a.tcp)
	a.mux.HandleFunc("/agentiso.guest.v1.Guest/Shutdown", func(http.ResponseWriter, *http.Request) {
		panic("a user reached the Guest service")
	})
	return a
}

func (a *Agent) ServeHTTP(w http.ResponseWriter, r *http.Request) { a.mux.ServeHTTP(w, r) }

// tcp answers "got LINE" to each line, and "bye" to the end of input. Port 9
// refuses.
func (a *Agent) tcp(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Get("port") == "9" {
		w.WriteHeader(http.StatusBadGateway)
		_, _ = io.WriteString(w, `{"code":502,"message":"connection refused"}`)
		return
	}
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
	for lines := bufio.NewScanner(rw.Reader); lines.Scan(); {
		if _, err := fmt.Fprintf(conn, "got %s\n", lines.Text()); err != nil {
			return
		}
	}
	_, _ = io.WriteString(conn, "bye\n")
}

type sender func(*process.ProcessEvent) error

func data(stdout, stderr, pty []byte) *process.ProcessEvent {
	d := &process.ProcessEvent_DataEvent{}
	switch {
	case stdout != nil:
		d.Output = &process.ProcessEvent_DataEvent_Stdout{Stdout: stdout}
	case stderr != nil:
		d.Output = &process.ProcessEvent_DataEvent_Stderr{Stderr: stderr}
	default:
		d.Output = &process.ProcessEvent_DataEvent_Pty{Pty: pty}
	}
	return &process.ProcessEvent{Event: &process.ProcessEvent_Data{Data: d}}
}

// Start runs a program.
func (a *Agent) Start(ctx context.Context, req *connect.Request[process.StartRequest], stream *connect.ServerStream[process.StartResponse]) error {
	cfg := req.Msg.GetProcess()
	switch cfg.GetCmd() {
	case "echo", "err", "exit", "signal", "cat", "count", "yes", "sleep", "env", "whoami", "size", "early":
	case "secret":
		return connect.NewError(connect.CodePermissionDenied, errors.New("secret: permission denied for user root"))
	default:
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("%s: executable file not found in PATH /bin", cfg.GetCmd()))
	}
	p := &proc{tag: req.Msg.GetTag(), sizes: make(chan string, 8), killed: make(chan struct{})}
	p.stdinR, p.stdinW = io.Pipe()
	if req.Msg.Stdin != nil && !req.Msg.GetStdin() {
		_ = p.stdinW.Close()
	}
	if s := req.Msg.GetPty().GetSize(); s != nil {
		p.sizes <- fmt.Sprintf("%dx%d\n", s.GetCols(), s.GetRows())
	}
	a.mu.Lock()
	a.next++
	pid := a.next
	a.procs[pid] = p
	a.mu.Unlock()
	defer func() { _ = p.stdinR.CloseWithError(io.ErrClosedPipe) }()
	send := func(e *process.ProcessEvent) error { return stream.Send(&process.StartResponse{Event: e}) }
	if err := send(&process.ProcessEvent{Event: &process.ProcessEvent_Start{Start: &process.ProcessEvent_StartEvent{Pid: pid}}}); err != nil {
		return err
	}
	user, _, _ := (&http.Request{Header: req.Header()}).BasicAuth()
	end, err := a.run(ctx, p, cfg, user, send)
	if err != nil {
		return err // its stream broke: it outlives that
	}
	a.mu.Lock()
	delete(a.procs, pid)
	a.mu.Unlock()
	return send(&process.ProcessEvent{Event: &process.ProcessEvent_End{End: end}})
}

func (a *Agent) run(ctx context.Context, p *proc, cfg *process.ProcessConfig, user string, send sender) (*process.ProcessEvent_EndEvent, error) {
	exited := &process.ProcessEvent_EndEvent{Exited: true, Status: "exit status 0"}
	killed := &process.ProcessEvent_EndEvent{ExitCode: -1, Status: "signal: killed"}
	line := strings.Join(cfg.GetArgs(), " ") + "\n"
	switch cfg.GetCmd() {
	case "echo":
		return exited, send(data([]byte(line), nil, nil))
	case "err":
		return exited, send(data(nil, []byte(line), nil))
	case "exit":
		n, _ := strconv.ParseInt(cfg.GetArgs()[0], 10, 32)
		msg := "exit status " + cfg.GetArgs()[0]
		return &process.ProcessEvent_EndEvent{Exited: true, ExitCode: int32(n), Status: msg, Error: &msg}, nil
	case "signal":
		return &process.ProcessEvent_EndEvent{ExitCode: -1, Status: "signal: " + strings.TrimSpace(line)}, nil
	case "env":
		return exited, send(data([]byte(cfg.GetEnvs()[cfg.GetArgs()[0]]+"\n"), nil, nil))
	case "whoami":
		return exited, send(data([]byte(user+" "+cfg.GetCwd()+"\n"), nil, nil))
	case "cat", "count":
		return a.input(p, cfg.GetCmd(), exited, killed, send)
	case "yes":
		block := []byte(strings.Repeat("y\n", 16<<10))
		for ctx.Err() == nil {
			select {
			case <-p.killed:
				return killed, nil
			default:
			}
			if err := send(data(block, nil, nil)); err != nil {
				return nil, err
			}
			a.Printed.Add(int64(len(block)))
		}
		return nil, ctx.Err()
	case "size":
		return a.sizes(ctx, p, exited, killed, send)
	case "sleep":
		select {
		case <-p.killed:
			return killed, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return exited, nil // early
}

func (a *Agent) input(p *proc, cmd string, exited, killed *process.ProcessEvent_EndEvent, send sender) (*process.ProcessEvent_EndEvent, error) {
	var total int64
	buf := make([]byte, 32<<10)
	for {
		n, err := p.stdinR.Read(buf)
		total += int64(n)
		if n > 0 && cmd == "cat" {
			if err := send(data(append([]byte(nil), buf[:n]...), nil, nil)); err != nil {
				return nil, err
			}
		}
		if errors.Is(err, io.ErrClosedPipe) {
			return killed, nil
		}
		if err != nil {
			break
		}
	}
	if cmd == "count" {
		return exited, send(data([]byte(strconv.FormatInt(total, 10)+"\n"), nil, nil))
	}
	return exited, nil
}

func (a *Agent) sizes(ctx context.Context, p *proc, exited, killed *process.ProcessEvent_EndEvent, send sender) (*process.ProcessEvent_EndEvent, error) {
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, p.stdinR)
	}()
	for {
		select {
		case s := <-p.sizes:
			if err := send(data(nil, nil, []byte(s))); err != nil {
				return nil, err
			}
		case <-ended:
			return exited, nil
		case <-p.killed:
			return killed, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (a *Agent) find(s *process.ProcessSelector) (*proc, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for pid, p := range a.procs {
		if pid == s.GetPid() || s.GetTag() != "" && p.tag == s.GetTag() {
			return p, nil
		}
	}
	return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("no process with pid %d is running", s.GetPid()))
}

// StreamInput feeds a program as fast as it reads.
func (a *Agent) StreamInput(_ context.Context, stream *connect.ClientStream[process.StreamInputRequest]) (*connect.Response[process.StreamInputResponse], error) {
	var p *proc
	for stream.Receive() {
		m := stream.Msg()
		if m.GetStart() != nil {
			var err error
			if p, err = a.find(m.GetStart().GetProcess()); err != nil {
				return nil, err
			}
			continue
		}
		in := append(m.GetData().GetInput().GetStdin(), m.GetData().GetInput().GetPty()...)
		if _, err := p.stdinW.Write(in); err != nil {
			return nil, connect.NewError(connect.CodeFailedPrecondition, err)
		}
	}
	return connect.NewResponse(&process.StreamInputResponse{}), stream.Err()
}

// CloseStdin ends a program's input.
func (a *Agent) CloseStdin(_ context.Context, req *connect.Request[process.CloseStdinRequest]) (*connect.Response[process.CloseStdinResponse], error) {
	p, err := a.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	_ = p.stdinW.Close()
	return connect.NewResponse(&process.CloseStdinResponse{}), nil
}

// Update resizes a program's terminal.
func (a *Agent) Update(_ context.Context, req *connect.Request[process.UpdateRequest]) (*connect.Response[process.UpdateResponse], error) {
	p, err := a.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	s := req.Msg.GetPty().GetSize()
	p.sizes <- fmt.Sprintf("%dx%d\n", s.GetCols(), s.GetRows())
	return connect.NewResponse(&process.UpdateResponse{}), nil
}

// SendSignal kills a program.
func (a *Agent) SendSignal(_ context.Context, req *connect.Request[process.SendSignalRequest]) (*connect.Response[process.SendSignalResponse], error) {
	p, err := a.find(req.Msg.GetProcess())
	if err != nil {
		return nil, err
	}
	a.Killed.Add(1)
	p.kill()
	return connect.NewResponse(&process.SendSignalResponse{}), nil
}
