package proc

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/api/process/processconnect"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/reap"
	"github.com/agentiso/agentiso/internal/guest/users"
)

func TestMain(m *testing.M) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fmt.Fprintln(os.Stderr, "set child subreaper:", err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/signal.signal_recv"))
}

// rig is a Service behind HTTP. Every test has one of its own.
type rig struct {
	*Service
	client processconnect.ProcessClient
	store  *identity.Store
}

type rigOptions struct {
	user    *users.User
	id      identity.Snapshot
	noTrees bool
}

func newRig(t testing.TB, o rigOptions) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	log := slog.New(slog.NewTextHandler(testWriter{t}, nil))
	reaper := reap.New()
	ctx, cancel := context.WithCancel(context.Background())
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		reaper.Run(ctx)
	}()
	store := identity.NewStore(o.id)
	s := New(reaper, store, log)
	if o.noTrees {
		if err := s.trees.close(); err != nil {
			t.Fatal(err)
		}
		s.trees.dir = ""
	}
	path, h := processconnect.NewProcessHandler(s, connect.WithReadMaxBytes(16<<20), connect.WithCompressMinBytes(math.MaxInt))
	mux := http.NewServeMux()
	mux.Handle(path, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if o.user != nil {
			r = r.WithContext(users.NewContext(r.Context(), *o.user))
		}
		h.ServeHTTP(w, r)
	}))
	srv := httptest.NewServer(mux)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		srv.CloseClientConnections()
		srv.Close()
		cancel()
		<-reaped
	})
	return &rig{Service: s, store: store, client: processconnect.NewProcessClient(srv.Client(), srv.URL)}
}

// testWriter logs into the test.
type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func sh(script string) *process.StartRequest {
	return &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}}
}

// running is a Start stream after its start event.
type running struct {
	pid    uint32
	stream *connect.ServerStreamForClient[process.StartResponse]
	cancel context.CancelFunc
}

func (r *rig) begin(t testing.TB, req *process.StartRequest) *running {
	t.Helper()
	run, err := r.tryBegin(t, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	return run
}

func (r *rig) tryBegin(t testing.TB, req *connect.Request[process.StartRequest]) (*running, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	st, err := r.client.Start(ctx, req)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { _ = st.Close() })
	if !st.Receive() {
		return nil, st.Err()
	}
	pid := st.Msg().GetEvent().GetStart().GetPid()
	if pid == 0 {
		return nil, fmt.Errorf("first event is %v", st.Msg())
	}
	return &running{pid, st, cancel}, nil
}

// result is a whole stream.
type result struct {
	stdout, stderr, pty string
	keepalives          int
	end                 *process.ProcessEvent_EndEvent
	err                 error
}

// wait reads the stream to its end.
func (run *running) wait() result {
	var res result
	for run.stream.Receive() {
		res.add(run.stream.Msg().GetEvent())
	}
	res.err = run.stream.Err()
	return res
}

func (res *result) add(ev *process.ProcessEvent) {
	switch ev := ev.GetEvent().(type) {
	case *process.ProcessEvent_Data:
		res.stdout += string(ev.Data.GetStdout())
		res.stderr += string(ev.Data.GetStderr())
		res.pty += string(ev.Data.GetPty())
	case *process.ProcessEvent_Keepalive:
		res.keepalives++
	case *process.ProcessEvent_End:
		res.end = ev.End
	}
}

// until reads until what has come contains want.
func (run *running) until(t *testing.T, want string) result {
	t.Helper()
	var res result
	for !strings.Contains(res.stdout+res.pty, want) {
		if !run.stream.Receive() {
			t.Fatalf("stream ended (%v) before %q; got %q", run.stream.Err(), want, res.stdout+res.pty)
		}
		res.add(run.stream.Msg().GetEvent())
	}
	return res
}

func (r *rig) run(t testing.TB, req *process.StartRequest) result {
	t.Helper()
	run, err := r.tryBegin(t, connect.NewRequest(req))
	if err != nil {
		return result{err: err}
	}
	return run.wait()
}

func byPID(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

func byTag(tag string) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: tag}}
}

func stdinOf(s string) *process.ProcessInput {
	return &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte(s)}}
}

func ptyOf(s string) *process.ProcessInput {
	return &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte(s)}}
}

// eventually polls until ok or a generous deadline.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// alive says whether pid is a process that is not a zombie.
func alive(pid int) bool {
	_, state := sessionOf(pid)
	return state != 0 && state != 'Z' && state != 'X'
}

func wantCode(t *testing.T, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v, want %v with %q", err, code, text)
	}
}

func (r *rig) listed(t *testing.T) int {
	t.Helper()
	list, err := r.client.List(t.Context(), connect.NewRequest(&process.ListRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return len(list.Msg.Processes)
}
