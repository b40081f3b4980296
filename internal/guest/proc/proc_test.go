package proc

import (
	"context"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/users"
)

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
	// The end of the killed process may come first.
	if res := run.wait(); res.err != nil || res.end.GetStatus() != "signal: killed" {
		wantCode(t, res.err, connect.CodeUnavailable, "shutting down")
	}
	wantCode(t, r.run(t, sh("true")).err, connect.CodeUnavailable, "shutting down")
	if alive(int(run.pid)) {
		t.Error("process is alive")
	}
	if r.trees.dir != "" {
		if _, err := os.Stat(r.trees.dir); !os.IsNotExist(err) {
			t.Errorf("cgroup is left: %v", err)
		}
	}
}
