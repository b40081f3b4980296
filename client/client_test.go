package client_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/server/servertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func connect(t *testing.T, d *servertest.Daemon) *client.Client {
	t.Helper()
	c, err := client.New(client.Options{Socket: d.Socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// start returns a client of a daemon with one workspace, a, and its agent.
func start(t *testing.T) (*servertest.Daemon, *client.Client, *servertest.Agent) {
	t.Helper()
	agent := servertest.NewAgent()
	d := servertest.Start(t, func() http.Handler { return agent })
	c := connect(t, d)
	if _, _, err := c.Create(t.Context(), client.CreateOptions{Name: "a"}); err != nil {
		t.Fatal(err)
	}
	return d, c, agent
}

func wantKind(t *testing.T, err error, k client.Kind) *client.Error {
	t.Helper()
	e, ok := errors.AsType[*client.Error](err)
	if !ok || e.Kind != k {
		t.Fatalf("error is %v of kind %q, not %q", err, client.KindOf(err), k)
	}
	return e
}

func TestWorkspaceLife(t *testing.T) {
	_, c, _ := start(t)
	ctx := t.Context()
	w, err := c.Get(ctx, "a")
	if err != nil || w.State != client.Running || w.Name != "a" {
		t.Fatalf("%+v, %v", w, err)
	}
	if _, err := c.Rename(ctx, w.ID[:8], "b"); err != nil {
		t.Error(err)
	}
	if s, err := c.Stats(ctx, "b"); err != nil || s.Processes != 7 || s.Boot != 800*time.Millisecond {
		t.Errorf("%+v, %v", s, err)
	}
	if w, err = c.Stop(ctx, "b", false); err != nil || w.State != client.Stopped {
		t.Errorf("%+v, %v", w, err)
	}
	_, err = c.Stats(ctx, "b")
	e := wantKind(t, err, client.WrongState)
	if e.Next == "" || e.ExitCode() != 4 || e.Guest {
		t.Errorf("%+v, exit %d", e, e.ExitCode())
	}
	if _, timings, err := c.Start(ctx, "b"); err != nil || timings.Start != "cold" {
		t.Errorf("%+v, %v", timings, err)
	}
	if id, err := c.Destroy(ctx, "b"); err != nil || id != w.ID {
		t.Errorf("%q, %v", id, err)
	}
	all, err := c.List(ctx)
	if err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestHold(t *testing.T) {
	d, c, _ := start(t)
	h, err := c.Hold(t.Context(), client.CreateOptions{Name: "held"})
	if err != nil || !h.Ephemeral {
		t.Fatalf("%+v, %v", h, err)
	}
	if err := h.Release(t.Context()); err != nil {
		t.Error(err)
	}
	if n := d.Workspaces.Count(); n != 1 {
		t.Errorf("%d workspaces after the release", n)
	}
	_, err = c.Hold(t.Context(), client.CreateOptions{Name: "a"})
	wantKind(t, err, client.NameTaken)

	// Another's Destroy is as good.
	h, err = c.Hold(t.Context(), client.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Destroy(t.Context(), h.ID); err != nil {
		t.Error(err)
	}
	if err := h.Release(t.Context()); err != nil {
		t.Error(err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	d.Workspaces.CreateGate = make(chan struct{})
	cancel()
	_, err = c.Hold(ctx, client.CreateOptions{})
	wantKind(t, err, client.Canceled)
}

func TestExecOutputAndExitCode(t *testing.T) {
	_, c, _ := start(t)
	for _, x := range []struct {
		argv           []string
		stdout, stderr string
		exit           int
	}{
		{[]string{"echo", "hello", "world"}, "hello world\n", "", 0},
		{[]string{"err", "oops"}, "", "oops\n", 0},
		{[]string{"exit", "42"}, "", "", 42},
		{[]string{"signal", "killed"}, "", "", 137},
		{[]string{"signal", "segmentation fault (core dumped)"}, "", "", 139},
		{[]string{"signal", "something new"}, "", "", 137},
		{[]string{"env", "X"}, "y\n", "", 0},
		{[]string{"whoami"}, "bob /srv\n", "", 0},
	} {
		var stdout, stderr bytes.Buffer
		exit, err := c.Exec(t.Context(), "a", x.argv, client.ExecOptions{
			Stdout: &stdout, Stderr: &stderr, User: "bob", Workdir: "/srv", Env: map[string]string{"X": "y"},
		})
		if err != nil || exit != x.exit || stdout.String() != x.stdout || stderr.String() != x.stderr {
			t.Errorf("%v: exit %d, %q, %q, %v", x.argv, exit, stdout.String(), stderr.String(), err)
		}
	}
}

func TestExecErrors(t *testing.T) {
	_, c, _ := start(t)
	_, err := c.Exec(t.Context(), "a", []string{"nonsense"}, client.ExecOptions{})
	if e := wantKind(t, err, client.NotFound); !errors.Is(err, client.ErrProgramNotFound) || !e.Guest {
		t.Errorf("%+v", e)
	}
	_, err = c.Exec(t.Context(), "a", []string{"secret"}, client.ExecOptions{})
	if !errors.Is(err, client.ErrProgramNotExecutable) {
		t.Error(err)
	}
	_, err = c.Exec(t.Context(), "nobody", []string{"echo"}, client.ExecOptions{})
	if e := wantKind(t, err, client.NotFound); errors.Is(err, client.ErrProgramNotFound) || e.Guest {
		t.Errorf("%+v", e)
	}
	_, err = c.Exec(t.Context(), "a", nil, client.ExecOptions{})
	wantKind(t, err, client.Invalid)
}

func TestExecInput(t *testing.T) {
	_, c, _ := start(t)
	const size = 8 << 20
	var out bytes.Buffer
	exit, err := c.Exec(t.Context(), "a", []string{"count"}, client.ExecOptions{Stdin: io.LimitReader(zeros{}, size), Stdout: &out})
	if err != nil || exit != 0 || out.String() != "8388608\n" {
		t.Errorf("exit %d, %q, %v", exit, out.String(), err)
	}
	out.Reset()
	text := strings.Repeat("some text\n", 50_000)
	exit, err = c.Exec(t.Context(), "a", []string{"cat"}, client.ExecOptions{Stdin: strings.NewReader(text), Stdout: &out})
	if err != nil || exit != 0 || out.String() != text {
		t.Errorf("exit %d, %d bytes, %v", exit, out.Len(), err)
	}
	// No input is an empty input.
	exit, err = c.Exec(t.Context(), "a", []string{"cat"}, client.ExecOptions{})
	if err != nil || exit != 0 {
		t.Errorf("exit %d, %v", exit, err)
	}
	// A command that ends first does not wait for its input; one that fails to
	// read kills it.
	r, w := io.Pipe()
	exit, err = c.Exec(t.Context(), "a", []string{"early"}, client.ExecOptions{Stdin: r})
	if err != nil || exit != 0 {
		t.Errorf("exit %d, %v", exit, err)
	}
	_ = w.Close() // lets the Read under way end
	_, err = c.Exec(t.Context(), "a", []string{"cat"}, client.ExecOptions{Stdin: io.MultiReader(strings.NewReader("x"), broken{})})
	if err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken input: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errors.New("broken") }

func TestExecTerminal(t *testing.T) {
	_, c, _ := start(t)
	resize := make(chan client.Size)
	in, typed := io.Pipe()
	seen := make(chan string, 8)
	p, err := c.StartProcess(t.Context(), "a", []string{"size"}, client.ExecOptions{
		TTY: &client.TTY{Size: client.Size{Cols: 80, Rows: 24}, Resize: resize}, Stdin: in,
		Stdout: writerFunc(func(b []byte) { seen <- string(b) }),
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan int, 1)
	go func() {
		exit, err := p.Wait()
		if err != nil {
			t.Error(err)
		}
		done <- exit
	}()
	for _, want := range []string{"80x24\n", "100x50\n", "120x60\n"} {
		if got := <-seen; got != want {
			t.Errorf("size %q, not %q", got, want)
		}
		switch want {
		case "80x24\n":
			resize <- client.Size{Cols: 100, Rows: 50}
		case "100x50\n":
			resize <- client.Size{Cols: 120, Rows: 60}
		}
	}
	_, _ = io.WriteString(typed, "q")
	_ = typed.Close()
	if exit := <-done; exit != 0 {
		t.Errorf("exit %d", exit)
	}
}

type writerFunc func([]byte)

func (f writerFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }

func TestExecIsKilledWithItsContext(t *testing.T) {
	_, c, agent := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	p, err := c.StartProcess(ctx, "a", []string{"sleep"}, client.ExecOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	_, err = p.Wait()
	wantKind(t, err, client.Canceled)
	_, err = c.Exec(t.Context(), "a", []string{"sleep"}, client.ExecOptions{Timeout: 50 * time.Millisecond})
	e := wantKind(t, err, client.Timeout)
	if !strings.Contains(e.Message, "50ms") {
		t.Error(e)
	}
	if n := agent.Killed.Load(); n == 0 {
		t.Error("nothing was killed")
	}
}

func TestExecIsKilledWhenItsOutputCannotBeWritten(t *testing.T) {
	_, c, agent := start(t)
	r, w := io.Pipe()
	_ = r.Close()
	_, err := c.Exec(t.Context(), "a", []string{"yes"}, client.ExecOptions{Stdout: w})
	if !errors.Is(err, io.ErrClosedPipe) {
		t.Error(err)
	}
	if agent.Killed.Load() != 1 {
		t.Error("the command runs on")
	}
}

func TestExecKillAndTerminate(t *testing.T) {
	_, c, _ := start(t)
	p, err := c.StartProcess(t.Context(), "a", []string{"sleep"}, client.ExecOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if exit, err := p.Wait(); err != nil || exit != 137 {
		t.Errorf("exit %d, %v", exit, err)
	}
	if err := p.Terminate(t.Context()); err != nil {
		t.Errorf("signalling what has ended: %v", err)
	}
}

// A daemon or a machine that goes away ends every kind of call with a reason.
func TestCallsEndWhenTheOtherSideDoes(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *servertest.Daemon){
		"machine": func(_ *testing.T, d *servertest.Daemon) { d.Workspaces.Crash("a") },
		"daemon":  func(t *testing.T, d *servertest.Daemon) { d.Stop(t) },
	} {
		t.Run(name, func(t *testing.T) {
			d, c, _ := start(t)
			p, err := c.StartProcess(t.Context(), "a", []string{"sleep"}, client.ExecOptions{})
			if err != nil {
				t.Fatal(err)
			}
			conn, err := c.DialTCP(t.Context(), "a", 80, "")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			logs := make(chan error, 1)
			began := make(chan struct{})
			go func() {
				logs <- c.Logs(context.Background(), "a", client.LogsOptions{Follow: true}, func([]byte) error { close(began); return nil })
			}()
			<-began
			end(t, d)
			_, err = p.Wait()
			if e := wantKind(t, err, client.Unavailable); e.Next == "" || e.Guest {
				t.Errorf("%+v", e)
			}
			if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, net.ErrClosed) {
				t.Log(err)
			}
			if err := <-logs; name == "daemon" {
				wantKind(t, err, client.Unavailable)
			} else if err != nil {
				t.Errorf("the console's end is an error: %v", err)
			}
		})
	}
}

// A daemon that dies says nothing: the connection just closes.
func TestDaemonThatDies(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_ = l.Close()
		_, _ = conn.Read(make([]byte, 1024))
		_ = conn.Close()
	}()
	c, err := client.New(client.Options{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.List(t.Context())
	if e := wantKind(t, err, client.Unavailable); !strings.Contains(e.Message, "went away while listing workspaces") || !strings.Contains(e.Next, "agentiso up") {
		t.Errorf("%+v", e)
	}
}

func TestNoDaemon(t *testing.T) {
	dir := t.TempDir()
	stale := filepath.Join(dir, "stale")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	for _, socket := range []string{stale, filepath.Join(dir, "none")} {
		c, err := client.New(client.Options{Socket: socket})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Info(t.Context())
		if e := wantKind(t, err, client.Unavailable); !strings.HasPrefix(e.Message, "no agentiso daemon is running") || e.Next != "Start the daemon with `agentiso up`." {
			t.Errorf("%+v", e)
		}
		c.Close()
	}
	if _, err := client.New(client.Options{}); client.KindOf(err) != client.Invalid {
		t.Error(err)
	}
}

func TestImages(t *testing.T) {
	d, c, _ := start(t)
	ctx := t.Context()
	var stages []string
	i, err := c.BuildImage(ctx, client.BuildImageOptions{Recipe: "minimal"}, func(p client.Progress) { stages = append(stages, p.Stage+p.Log) })
	if err != nil || i.Names[0] != "minimal" || strings.Join(stages, ",") != "download,unpackunpacking" {
		t.Errorf("%+v, %v, %v", i, stages, err)
	}
	_, err = c.BuildImage(ctx, client.BuildImageOptions{Recipe: "broken"}, nil)
	wantKind(t, err, client.Invalid)
	i, err = c.PullImage(ctx, client.PullImageOptions{Reference: "r/x:1", Name: "x", Auth: client.RegistryAuth{Username: "u", Password: "p"}}, nil)
	if err != nil || i.Source != "oci:r/x:1" || d.Images.PullAuth.Username != "u" || d.Images.PullAuth.Password != "p" {
		t.Errorf("%+v, %+v, %v", i, d.Images.PullAuth, err)
	}
	i, err = c.ImportImage(ctx, "mine", io.LimitReader(zeros{}, 3<<20))
	if err != nil || i.SizeBytes != 3<<20 || i.Digest != "sha256:mine" {
		t.Errorf("%+v, %v", i, err)
	}
	if _, err := c.ImportImage(ctx, "", strings.NewReader("")); client.KindOf(err) != client.Invalid {
		t.Error(err)
	}
	all, err := c.Images(ctx)
	if err != nil || len(all) != 4 {
		t.Errorf("%v, %v", all, err)
	}
	if _, _, err := c.Create(ctx, client.CreateOptions{Name: "b", Image: "mine"}); err != nil {
		t.Fatal(err)
	}
	_, _, err = c.RemoveImage(ctx, "mine")
	wantKind(t, err, client.InUse)
	if digest, removed, err := c.RemoveImage(ctx, "x"); err != nil || digest != "sha256:x" || !removed {
		t.Errorf("%q, %v, %v", digest, removed, err)
	}
	k, err := c.BuildKernel(ctx, 2, false, nil)
	if err != nil || !k.Default {
		t.Errorf("%+v, %v", k, err)
	}
	if kk, err := c.Kernels(ctx); err != nil || len(kk) != 1 {
		t.Errorf("%v, %v", kk, err)
	}
	checks, err := c.Doctor(ctx, false)
	if err != nil || len(checks) != 3 || checks[2].Verdict != client.VerdictFail {
		t.Errorf("%v, %v", checks, err)
	}
	info, err := c.Info(ctx)
	if err != nil || info.PID != os.Getpid() || info.WorkspacesRunning != 2 {
		t.Errorf("%+v, %v", info, err)
	}
	if err := c.Shutdown(ctx, true); err != nil || !<-d.System.ShutdownAsked {
		t.Error(err)
	}
}

// The end of the caller's context ends a build, and its stream.
func TestBuildIsCanceled(t *testing.T) {
	d, c, _ := start(t)
	d.Images.Gate = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.BuildImage(ctx, client.BuildImageOptions{Recipe: "dev"}, func(client.Progress) { cancel() })
	wantKind(t, err, client.Canceled)
}

func TestDialTCP(t *testing.T) {
	_, c, _ := start(t)
	conn, err := c.DialTCP(t.Context(), "a", 80, "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "hi\n"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); string(b) != "got hi\nbye\n" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	_, err = c.DialTCP(t.Context(), "a", 9, "")
	if e := wantKind(t, err, client.Unavailable); !strings.Contains(e.Message, "connection refused") {
		t.Error(e)
	}
	_, err = c.DialTCP(t.Context(), "nobody", 80, "")
	wantKind(t, err, client.NotFound)
}
