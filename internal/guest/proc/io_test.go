package proc

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/internal/guest/users"
)

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
		r.waiting.Store(maxInput)
		_, err = r.client.SendInput(ctx, connect.NewRequest(&process.SendInputRequest{Process: byPID(run.pid), Input: big}))
		wantCode(t, err, connect.CodeResourceExhausted, "input wait for processes that do not read")
		r.waiting.Store(0)
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
	// Under nohup, as in CI, this process and its children ignore SIGHUP; with
	// a handler of its own the children get the default back.
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
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
