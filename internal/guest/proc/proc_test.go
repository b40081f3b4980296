package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

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
	path, h := processconnect.NewProcessHandler(s, HandlerOptions(log)...)
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

func TestEnds(t *testing.T) {
	r := newRig(t, rigOptions{})
	tests := []struct {
		script string
		want   *process.ProcessEvent_EndEvent
	}{
		{"exit 0", &process.ProcessEvent_EndEvent{Exited: true, Status: "exit status 0"}},
		{"exit 3", &process.ProcessEvent_EndEvent{ExitCode: 3, Exited: true, Status: "exit status 3", Error: proto.String("exit status 3")}},
		{"kill -KILL $$", &process.ProcessEvent_EndEvent{ExitCode: -1, Status: "signal: killed", Error: proto.String("signal: killed")}},
		{"kill -TERM $$", &process.ProcessEvent_EndEvent{ExitCode: -1, Status: "signal: terminated", Error: proto.String("signal: terminated")}},
	}
	for _, tt := range tests {
		res := r.run(t, sh("echo out; echo err >&2; "+tt.script))
		if res.err != nil || !proto.Equal(res.end, tt.want) || res.stdout != "out\n" || res.stderr != "err\n" {
			t.Errorf("%s: %+v, want end %v", tt.script, res, tt.want)
		}
	}
	eventually(t, "nothing is listed", func() bool { return r.listed(t) == 0 })
}

func (r *rig) listed(t *testing.T) int {
	t.Helper()
	list, err := r.client.List(t.Context(), connect.NewRequest(&process.ListRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return len(list.Msg.Processes)
}

func TestEnvironment(t *testing.T) {
	u := users.User{Name: "dev", UID: 12345, GID: 12346, Groups: []uint32{12347, 12348}, Home: "/", Shell: "/bin/dash"}
	// What the agent has for itself must not reach its processes.
	leaked, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY, 0) // without O_CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(leaked)
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("100"), 0); err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile("/proc/self/oom_score_adj", []byte("0"), 0)
	r := newRig(t, rigOptions{user: &u, id: identity.Snapshot{Env: map[string]string{"A": "identity", "B": "identity", "HOME": "/wrong"}}})
	req := sh("id -u; id -g; id -G; env; umask; ls /proc/self/fd | tr '\\n' ' '; cat /proc/self/oom_score_adj; nice")
	req.Process.Envs = map[string]string{"B": "request", "C": "request"}
	req.Process.Cwd = proto.String("/usr")
	res := r.run(t, req)
	for _, want := range []string{
		"12345\n12346\n12346 12347 12348\n", "\nA=identity\n", "\nB=request\n", "\nC=request\n", "\nHOME=/\n", "\nUSER=dev\n", "\nLOGNAME=dev\n",
		"\nSHELL=/bin/dash\n", "\nPATH=" + defaultPath + "\n", "\nPWD=/usr\n", "\n0022\n0 1 2 3 ",
	} {
		if !strings.Contains(res.stdout, want) {
			t.Errorf("no %q in:\n%s%s%v", want, res.stdout, res.stderr, res.err)
		}
	}
	if !strings.HasSuffix(res.stdout, "\n0 1 2 3 0\n0\n") { // 3 is ls's own
		t.Errorf("descriptors, OOM score, nice: %q", res.stdout[len(res.stdout)-40:])
	}
}

func TestDescriptorLimit(t *testing.T) {
	before := unix.Rlimit{Cur: math.MaxUint64, Max: math.MaxUint64}
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		t.Fatal(err)
	}
	higher := unix.Rlimit{Cur: before.Cur, Max: before.Max + 1}
	if unix.Prlimit(0, unix.RLIMIT_NOFILE, &higher, nil) != nil {
		t.Skip("missing capability: CAP_SYS_RESOURCE")
	}
	r := newRig(t, rigOptions{})
	if res := r.run(t, sh("sleep 0.1; ulimit -Sn; ulimit -Hn")); res.stdout != "1024\n524288\n" {
		t.Errorf("%+v", res)
	}
}

func TestDirectory(t *testing.T) {
	home := t.TempDir()
	u := users.User{Name: "root", Home: home, Shell: "/bin/sh"}
	r := newRig(t, rigOptions{user: &u})
	if err := os.Mkdir(home+"/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	for cwd, want := range map[string]string{"": home, "sub": home + "/sub", "~/sub": home + "/sub", "/usr": "/usr"} {
		req := sh("pwd")
		if cwd != "" {
			req.Process.Cwd = &cwd
		}
		if res := r.run(t, req); res.stdout != want+"\n" {
			t.Errorf("cwd %q: %q, %v; want %q", cwd, res.stdout, res.err, want)
		}
	}
	if err := os.RemoveAll(home); err != nil {
		t.Fatal(err)
	}
	if res := r.run(t, sh("pwd")); res.stdout != "/\n" {
		t.Errorf("without a home: %q, %v", res.stdout, res.err)
	}
	req := sh("pwd")
	req.Process.Cwd = proto.String("/no/such/place")
	wantCode(t, r.run(t, req).err, connect.CodeInvalidArgument, `cwd "/no/such/place": no such directory`)
	req.Process.Cwd = proto.String("/etc/passwd")
	wantCode(t, r.run(t, req).err, connect.CodeInvalidArgument, `cwd "/etc/passwd": not a directory`)
}

func TestWhatCannotBeStarted(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir+"/..", 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string, mode os.FileMode) {
		if err := os.WriteFile(dir+"/"+name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("plain", "#!/bin/sh\n", 0o644)
	write("orphaned", "#!/no/such/interpreter -x\n", 0o755)
	write("garbage", "\x01\x02\x03", 0o755)
	write("private", "#!/bin/sh\n", 0o700)
	u := users.User{Name: "dev", UID: 12345, GID: 12345, Home: "/", Shell: "/bin/sh"}
	r := newRig(t, rigOptions{user: &u})
	cfg := func(cmd string) *process.ProcessConfig {
		return &process.ProcessConfig{Cmd: cmd, Envs: map[string]string{"PATH": dir}}
	}
	tests := []struct {
		name string
		req  *process.StartRequest
		code connect.Code
		text string
	}{
		{"empty", &process.StartRequest{}, connect.CodeInvalidArgument, "cmd is empty"},
		{"absent", &process.StartRequest{Process: cfg("nope")}, connect.CodeNotFound, "nope: executable file not found in PATH " + dir},
		{"absent path", &process.StartRequest{Process: cfg("/nope")}, connect.CodeNotFound, "/nope: executable file not found"},
		{"not executable", &process.StartRequest{Process: cfg("plain")}, connect.CodePermissionDenied, "plain: permission denied for user dev"},
		{"another's", &process.StartRequest{Process: cfg(dir + "/private")}, connect.CodePermissionDenied, "permission denied for user dev"},
		{"directory", &process.StartRequest{Process: cfg("/usr")}, connect.CodeInvalidArgument, "/usr: is a directory"},
		{"interpreter", &process.StartRequest{Process: cfg("orphaned")}, connect.CodeNotFound, `its interpreter "/no/such/interpreter -x": executable file not found`},
		{"garbage", &process.StartRequest{Process: cfg("garbage")}, connect.CodeInvalidArgument, "not a program"},
		{"zero byte", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/true", Args: []string{"a", "b\x00"}}}, connect.CodeInvalidArgument, "args[1] holds a zero byte"},
		{"long", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/true", Args: []string{strings.Repeat("a", 1<<17)}}}, connect.CodeInvalidArgument, "args[0] is 131072 bytes long"},
		{"many", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/true", Args: make([]string, 1<<18)}}, connect.CodeInvalidArgument, "arguments and environment take"},
		{"env", &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/true", Envs: map[string]string{"A=B": ""}}}, connect.CodeInvalidArgument, `envs: "A=B" is not a name`},
		{"tag", &process.StartRequest{Process: cfg("/bin/true"), Tag: proto.String(strings.Repeat("t", 257))}, connect.CodeInvalidArgument, "tag is longer"},
		{"size", &process.StartRequest{Process: cfg("/bin/true"), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 70000}}}, connect.CodeInvalidArgument, "pty.size"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { wantCode(t, r.run(t, tt.req).err, tt.code, tt.text) })
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.reserved != 0 || len(r.byTag) != 0 {
		t.Errorf("%d places and %d tags are still taken", r.reserved, len(r.byTag))
	}
}

func TestDefaultUser(t *testing.T) {
	r := newRig(t, rigOptions{id: identity.Snapshot{DefaultUser: "daemon", Workdir: "/usr"}})
	if res := r.run(t, sh("id -un; pwd")); res.stdout != "daemon\n/usr\n" {
		t.Errorf("%+v", res)
	}
	r = newRig(t, rigOptions{id: identity.Snapshot{DefaultUser: "nobody-of-that-name"}})
	wantCode(t, r.run(t, sh("true")).err, connect.CodeUnauthenticated, "nobody-of-that-name")
}

func TestOutlivesItsStreamAndConnects(t *testing.T) {
	r := newRig(t, rigOptions{})
	req := sh("echo first; read x; echo got $x; read x; echo last; exit 7")
	req.Tag = proto.String("job")
	run := r.begin(t, req)
	run.until(t, "first")
	run.cancel()
	_ = run.stream.Close()
	_, _ = r.client.SendInput(t.Context(), connect.NewRequest(&process.SendInputRequest{Process: byTag("job"), Input: stdinOf("one\n")}))
	r.mu.Lock()
	p := r.byPID[run.pid]
	r.mu.Unlock()
	eventually(t, "its output was read while nobody was attached", func() bool {
		p.out.mu.Lock()
		defer p.out.mu.Unlock()
		return len(p.out.readers) == 0 && p.out.size > 0 && strings.Contains(string(p.out.segs[len(p.out.segs)-1].data), "got one\n")
	})

	list, err := r.client.List(t.Context(), connect.NewRequest(&process.ListRequest{}))
	if err != nil || len(list.Msg.Processes) != 1 {
		t.Fatalf("list: %v, %v", list, err)
	}
	if got := list.Msg.Processes[0]; got.Pid != run.pid || got.GetTag() != "job" || got.Config.GetCmd() != "/bin/sh" {
		t.Errorf("listed %v", got)
	}
	// Two readers: one of what comes, one of what was kept as well.
	var outs [2]result
	done := make(chan struct{})
	streams := make([]*connect.ServerStreamForClient[process.ConnectResponse], 2)
	for i := range 2 {
		creq := connect.NewRequest(&process.ConnectRequest{Process: byTag("job")})
		if i == 1 {
			creq.Header().Set(replayHeader, "tail")
		}
		st, err := r.client.Connect(t.Context(), creq)
		if err != nil || !st.Receive() || st.Msg().GetEvent().GetStart().GetPid() != run.pid {
			t.Fatalf("connect: %v, %v", st.Msg(), err)
		}
		streams[i] = st
	}
	go func() {
		defer close(done)
		for i, st := range streams {
			for st.Receive() {
				outs[i].add(st.Msg().GetEvent())
			}
			outs[i].err = st.Err()
			_ = st.Close()
		}
	}()
	if _, err := r.client.SendInput(t.Context(), connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("two\n")})); err != nil {
		t.Fatal(err)
	}
	<-done
	for i, want := range []string{"last\n", "first\ngot one\nlast\n"} {
		if outs[i].err != nil || outs[i].stdout != want || outs[i].end.GetExitCode() != 7 {
			t.Errorf("reader %d: %+v, want %q", i, outs[i], want)
		}
	}
	_, err = r.client.SendInput(t.Context(), connect.NewRequest(&process.SendInputRequest{Process: byTag("job"), Input: stdinOf("x")}))
	wantCode(t, err, connect.CodeNotFound, `no process with tag "job" is running`)
}

func TestDeadlineKillsTheTree(t *testing.T) {
	for _, noTrees := range []bool{false, true} {
		t.Run(fmt.Sprintf("cgroup=%t", !noTrees), func(t *testing.T) {
			r := newRig(t, rigOptions{noTrees: noTrees})
			escape := "setsid sh -c 'trap \"\" TERM HUP; echo $$; exec sleep 1000' &"
			if r.trees.dir == "" {
				if !noTrees {
					t.Skip("missing capability: cgroup v2 with cgroup.kill")
				}
				escape = "sh -c 'trap \"\" TERM HUP; echo $$; exec sleep 1000' &"
			}
			ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
			defer cancel()
			st, err := r.client.Start(ctx, connect.NewRequest(sh(escape+" sh -c 'echo $$; exec sleep 1000'")))
			if err != nil {
				t.Fatal(err)
			}
			var res result
			var pid int
			for st.Receive() {
				res.add(st.Msg().GetEvent())
				pid = max(pid, int(st.Msg().GetEvent().GetStart().GetPid()))
			}
			wantCode(t, st.Err(), connect.CodeDeadlineExceeded, "")
			pids := []int{pid}
			for _, f := range strings.Fields(res.stdout) {
				n, err := strconv.Atoi(f)
				if err != nil {
					t.Fatal(err)
				}
				pids = append(pids, n)
			}
			if len(pids) != 3 {
				t.Fatalf("started %v", pids)
			}
			eventually(t, fmt.Sprintf("%v are dead", pids), func() bool {
				for _, pid := range pids {
					if alive(pid) {
						return false
					}
				}
				return true
			})
			_ = st.Close()
		})
	}
}

// A deadline is the process's and not the stream's: it is kept when the client
// has gone.
func TestDeadlineAfterTheStreamIsLost(t *testing.T) {
	r := newRig(t, rigOptions{})
	req := connect.NewRequest(sh("sleep 1000"))
	req.Header().Set("Connect-Timeout-Ms", "400")
	run, err := r.tryBegin(t, req)
	if err != nil {
		t.Fatal(err)
	}
	run.cancel()
	eventually(t, "it is killed", func() bool { return !alive(int(run.pid)) })
}

func TestBackgroundProcessesLiveOn(t *testing.T) {
	r := newRig(t, rigOptions{})
	// It inherits the pipe and writes to it long after the end.
	res := r.run(t, sh("(echo $$; sleep 1; echo a; sleep 1; echo b; exec sleep 1000) & echo started"))
	if res.err != nil || res.end.GetExitCode() != 0 || !strings.Contains(res.stdout, "started\n") {
		t.Fatalf("%+v", res)
	}
	if n := r.listed(t); n != 0 {
		t.Errorf("%d listed", n)
	}
	var bg int
	for _, pid := range allProcesses() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if string(b) == "sleep\x001000\x00" {
			bg = pid
		}
	}
	eventually(t, "the background process got past its writes", func() bool {
		for _, pid := range allProcesses() {
			b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if string(b) == "sleep\x001000\x00" {
				bg = pid
			}
		}
		return bg != 0
	})
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if r.trees.dir != "" && alive(bg) {
		t.Error("background process survived Close")
	}
	_ = unix.Kill(bg, unix.SIGKILL)
}

func TestInput(t *testing.T) {
	r := newRig(t, rigOptions{})
	ctx := t.Context()
	t.Run("closed", func(t *testing.T) {
		run := r.begin(t, sh("cat; echo eof"))
		st := r.client.StreamInput(ctx)
		sel := &process.StreamInputRequest{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: byPID(run.pid)}}}
		if err := st.Send(sel); err != nil {
			t.Fatal(err)
		}
		var want strings.Builder
		for i := range 100 {
			line := fmt.Sprintf("line %d\n", i)
			want.WriteString(line)
			data := &process.StreamInputRequest{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{Input: stdinOf(line)}}}
			if err := st.Send(data); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := st.CloseAndReceive(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.client.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: byPID(run.pid)})); err != nil {
			t.Fatal(err)
		}
		if res := run.wait(); res.stdout != want.String()+"eof\n" {
			t.Errorf("%d bytes, %v", len(res.stdout), res.end)
		}
	})
	t.Run("closed twice", func(t *testing.T) {
		run := r.begin(t, sh("exec sleep 1000"))
		req := &process.CloseStdinRequest{Process: byPID(run.pid)}
		if _, err := r.client.CloseStdin(ctx, connect.NewRequest(req)); err != nil {
			t.Fatal(err)
		}
		_, err := r.client.CloseStdin(ctx, connect.NewRequest(req))
		wantCode(t, err, connect.CodeFailedPrecondition, "standard input is closed")
		_, err = r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("x")}))
		wantCode(t, err, connect.CodeFailedPrecondition, "standard input is closed")
		_, err = r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: ptyOf("x")}))
		wantCode(t, err, connect.CodeFailedPrecondition, "has no terminal")
		_, err = r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid)}))
		wantCode(t, err, connect.CodeInvalidArgument, "neither stdin nor pty")
		_, err = r.client.Update(ctx, connect.NewRequest(&process.UpdateRequest{Process: byPID(run.pid), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 1, Rows: 1}}}))
		wantCode(t, err, connect.CodeFailedPrecondition, "has no terminal")
	})
	t.Run("none", func(t *testing.T) {
		req := sh("readlink /proc/self/fd/0; cat; echo eof; exec sleep 1000")
		req.Stdin = proto.Bool(false)
		run := r.begin(t, req)
		if res := run.until(t, "eof\n"); res.stdout != "/dev/null\neof\n" {
			t.Errorf("%+v", res)
		}
		_, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("x")}))
		wantCode(t, err, connect.CodeFailedPrecondition, "without standard input")
	})
	t.Run("broken pipe", func(t *testing.T) {
		run := r.begin(t, sh("exec <&-; echo ready; exec sleep 1000"))
		run.until(t, "ready")
		_, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("x")}))
		wantCode(t, err, connect.CodeFailedPrecondition, "no longer reads its standard input")
	})
	t.Run("not read", func(t *testing.T) {
		run := r.begin(t, sh("read x; echo got $x; exec sleep 1000"))
		if _, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("hello\n")})); err != nil {
			t.Fatal(err)
		}
		run.until(t, "got hello")
		tctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		big := stdinOf(strings.Repeat("x", 1<<20))
		_, err := r.client.SendInput(tctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: big}))
		wantCode(t, err, connect.CodeDeadlineExceeded, "")
		// Others are not held up, nor is this one for ever.
		if res := r.run(t, sh("echo fine")); res.stdout != "fine\n" {
			t.Errorf("%+v", res)
		}
		blocked := make(chan error, 1)
		go func() {
			_, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: big}))
			blocked <- err
		}()
		if _, err := r.client.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: byPID(run.pid), Signal: process.Signal_SIGNAL_SIGKILL})); err != nil {
			t.Fatal(err)
		}
		if err := <-blocked; err == nil {
			t.Error("a write to a killed process succeeded")
		}
		run.wait()
	})
}

func TestSignalsAndSelectors(t *testing.T) {
	r := newRig(t, rigOptions{})
	ctx := t.Context()
	signal := func(sel *process.ProcessSelector, sig process.Signal) error {
		_, err := r.client.SendSignal(ctx, connect.NewRequest(&process.SendSignalRequest{Process: sel, Signal: sig}))
		return err
	}
	run := r.begin(t, sh("trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.05; done"))
	run.until(t, "ready")
	wantCode(t, signal(byPID(run.pid), process.Signal_SIGNAL_UNSPECIFIED), connect.CodeInvalidArgument, "only SIGTERM (15) and SIGKILL (9)")
	wantCode(t, signal(nil, process.Signal_SIGNAL_SIGTERM), connect.CodeInvalidArgument, "neither pid nor tag")
	wantCode(t, signal(byPID(1), process.Signal_SIGNAL_SIGTERM), connect.CodeNotFound, "no process with pid 1 is running")
	if err := signal(byPID(run.pid), process.Signal_SIGNAL_SIGTERM); err != nil {
		t.Fatal(err)
	}
	if res := run.wait(); res.end.GetExitCode() != 9 || !strings.Contains(res.stdout, "term\n") {
		t.Errorf("%+v", res)
	}

	req := sh("exec sleep 1000")
	req.Tag = proto.String("one")
	run = r.begin(t, req)
	wantCode(t, r.run(t, req).err, connect.CodeAlreadyExists, `tag "one"`)
	if err := signal(byTag("one"), process.Signal_SIGNAL_SIGKILL); err != nil {
		t.Fatal(err)
	}
	if res := run.wait(); res.end.GetStatus() != "signal: killed" || res.end.GetExited() || res.end.GetExitCode() != -1 {
		t.Errorf("%+v", res)
	}
	run = r.begin(t, req) // the tag is free again
	run.cancel()
}

func TestTerminal(t *testing.T) {
	r := newRig(t, rigOptions{user: &users.User{Name: "dev", UID: 12345, GID: 12345, Home: "/", Shell: "/bin/sh"}})
	ctx := t.Context()
	req := sh("stty size; tty; echo > $(tty); trap 'stty size' WINCH; echo $TERM; read line; echo \"<$line>\"; read line || echo eof; while :; do sleep 0.05; done")
	req.Pty = &process.PTY{Size: &process.PTY_Size{Cols: 100, Rows: 30}}
	run := r.begin(t, req)
	out := run.until(t, "xterm-256color")
	if !strings.Contains(out.pty, "30 100\r\n/dev/pts/") || out.stdout+out.stderr != "" {
		t.Errorf("%+v", out)
	}
	input := func(s string) {
		t.Helper()
		if _, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: ptyOf(s)})); err != nil {
			t.Fatal(err)
		}
	}
	input("hello\n")
	run.until(t, "<hello>")
	_, err := r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: stdinOf("x")}))
	wantCode(t, err, connect.CodeFailedPrecondition, "has a terminal")
	if _, err := r.client.CloseStdin(ctx, connect.NewRequest(&process.CloseStdinRequest{Process: byPID(run.pid)})); err != nil {
		t.Fatal(err)
	}
	run.until(t, "eof")
	size := &process.PTY{Size: &process.PTY_Size{Cols: 132, Rows: 43}}
	if _, err := r.client.Update(ctx, connect.NewRequest(&process.UpdateRequest{Process: byPID(run.pid), Pty: size})); err != nil {
		t.Fatal(err)
	}
	run.until(t, "43 132")
	input("\x03")
	if res := run.wait(); res.end.GetStatus() != "signal: interrupt" && res.end.GetExitCode() != 130 {
		t.Errorf("%+v", res)
	}
}

// The end of a session's leader hangs its terminal up: whoever is left in the
// foreground goes.
func TestTerminalHangup(t *testing.T) {
	r := newRig(t, rigOptions{})
	req := sh("sleep 1000 & echo pid=$! .; sleep 0.2")
	req.Pty = &process.PTY{}
	run := r.begin(t, req)
	res := run.wait()
	_, rest, _ := strings.Cut(res.pty, "pid=")
	digits, _, _ := strings.Cut(rest, " ")
	pid, err := strconv.Atoi(digits)
	if err != nil || res.end.GetExitCode() != 0 {
		t.Fatalf("%+v", res)
	}
	eventually(t, "SIGHUP ends it", func() bool { return !alive(pid) })
}

func TestKeepalive(t *testing.T) {
	r := newRig(t, rigOptions{})
	req := connect.NewRequest(sh("read x"))
	req.Header().Set("Keepalive-Ping-Interval", "1")
	run, err := r.tryBegin(t, req)
	if err != nil {
		t.Fatal(err)
	}
	if !run.stream.Receive() || run.stream.Msg().GetEvent().GetKeepalive() == nil {
		t.Errorf("got %v, %v", run.stream.Msg(), run.stream.Err())
	}
	for in, want := range map[string]time.Duration{"": 0, "x": 0, "-1": 0, "0": 0, "5": 5 * time.Second, "99999999": maxKeepalive} {
		if got := keepalive(func(string) string { return in }); got != want {
			t.Errorf("%q: %v, want %v", in, got, want)
		}
	}
}

func TestTooMany(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.mu.Lock()
	r.max = 2
	r.mu.Unlock()
	a := r.begin(t, sh("read x"))
	r.begin(t, sh("read x"))
	wantCode(t, r.run(t, sh("true")).err, connect.CodeResourceExhausted, "2 processes are running")
	if _, err := r.client.CloseStdin(t.Context(), connect.NewRequest(&process.CloseStdinRequest{Process: byPID(a.pid)})); err != nil {
		t.Fatal(err)
	}
	a.wait()
	if res := r.run(t, sh("echo ok")); res.stdout != "ok\n" {
		t.Errorf("%+v", res)
	}
}

// Starts that wait for a file system that does not answer take a bounded number
// of threads, and the next one is told in time.
func TestStartsThatHang(t *testing.T) {
	r := newRig(t, rigOptions{})
	for range maxStarting {
		r.starting <- struct{}{}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, _, err := r.start(ctx, sh("true"))
	wantCode(t, err, connect.CodeDeadlineExceeded, "")
	<-r.starting
	if res := r.run(t, sh("echo ok")); res.stdout != "ok\n" {
		t.Errorf("%+v", res)
	}
}

func TestCloseEndsStreams(t *testing.T) {
	r := newRig(t, rigOptions{})
	run := r.begin(t, sh("setsid sleep 1000 & sleep 1000"))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	res := run.wait()
	wantCode(t, res.err, connect.CodeUnavailable, "shutting down")
	wantCode(t, r.run(t, sh("true")).err, connect.CodeUnavailable, "shutting down")
	if alive(int(run.pid)) {
		t.Error("process is alive")
	}
	if !errors.Is(res.err, io.EOF) && r.trees.dir != "" {
		if _, err := os.Stat(r.trees.dir); !os.IsNotExist(err) {
			t.Errorf("cgroup is left: %v", err)
		}
	}
}
