package agentiso_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/guest"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/proc"
	"github.com/agentiso/agentiso/internal/guest/reap"
	"github.com/agentiso/agentiso/internal/server/servertest"
)

// session returns a client of a daemon whose one workspace, box, has the real
// agent inside, on this host and as this user: client, server and agent in one
// process, with only the machine left out.
func session(t *testing.T) *client.Client {
	t.Helper()
	me, err := user.Current()
	if err != nil {
		t.Skip("missing capability: a user account: ", err)
	}
	log := slog.New(slog.DiscardHandler)
	store := identity.NewStore(identity.Snapshot{DefaultUser: me.Username, Workdir: "/", Configured: true})
	reaper := reap.New()
	ctx, stop := context.WithCancel(context.Background())
	reaping := make(chan struct{})
	go func() { defer close(reaping); reaper.Run(ctx) }()
	processes := proc.New(reaper, store, log)
	tunnels := identity.NewTunnels(log)
	agent := guest.New(guest.Options{Identity: store, Process: processes, Connect: tunnels, Log: log})
	t.Cleanup(func() {
		cut, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = agent.Close(cut)
		_ = tunnels.Close()
		_ = processes.Close()
		stop()
		<-reaping
	})
	d := servertest.Start(t, func() http.Handler { return agent.Handler() })
	c, err := client.New(client.Options{Socket: d.Socket})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if _, _, err := c.Create(t.Context(), client.CreateOptions{Name: "box"}); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestSessionExec(t *testing.T) {
	c := session(t)
	sh := func(script string) []string { return []string{"/bin/sh", "-c", script} }
	for name, x := range map[string]struct {
		argv           []string
		in             string
		stdout, stderr string
		exit           int
	}{
		"output":      {sh("echo out; echo err >&2; exit 3"), "", "out\n", "err\n", 3},
		"input":       {sh("tr a-z A-Z"), "some text", "SOME TEXT", "", 0},
		"environment": {sh("echo $GREETING from $(pwd)"), "", "hello from /tmp\n", "", 0},
		"killed":      {sh("kill -KILL $$"), "", "", "", 137},
		"terminated":  {sh("kill -TERM $$"), "", "", "", 143},
		"ends early":  {sh("exit 0"), strings.Repeat("x", 4<<20), "", "", 0},
	} {
		var stdout, stderr bytes.Buffer
		exit, err := c.Exec(t.Context(), "box", x.argv, client.ExecOptions{
			Stdin: strings.NewReader(x.in), Stdout: &stdout, Stderr: &stderr,
			Workdir: "/tmp", Env: map[string]string{"GREETING": "hello"},
		})
		if err != nil || exit != x.exit || stdout.String() != x.stdout || stderr.String() != x.stderr {
			t.Errorf("%s: exit %d, %q, %q, %v", name, exit, stdout.String(), stderr.String(), err)
		}
	}
}

func TestSessionExecRefusals(t *testing.T) {
	c := session(t)
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]struct {
		program, user, dir string
		want               error
	}{
		"no such program": {"no-such-program", "", "", client.ErrProgramNotFound},
		"no such path":    {"/no/such/program", "", "", client.ErrProgramNotFound},
		"not a program":   {plain, "", "", client.ErrProgramNotExecutable},
		"a directory":     {"/tmp", "", "", client.ErrProgramNotExecutable},
		"no such cwd":     {"/bin/sh", "", "/no/such/dir", client.ErrProgramNotExecutable},
		"no such user":    {"/bin/sh", "no-such-user", "", nil},
	} {
		_, err := c.Exec(t.Context(), "box", []string{x.program}, client.ExecOptions{User: x.user, Workdir: x.dir})
		e, ok := errors.AsType[*client.Error](err)
		if !ok || !e.Guest || e.Next == "" {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if x.want != nil && !errors.Is(err, x.want) || x.want == nil && e.Kind != client.Unauthorized {
			t.Errorf("%s: %v (%s)", name, err, e.Kind)
		}
	}
}

func TestSessionExecBulk(t *testing.T) {
	c := session(t)
	const size = 64 << 20
	out := &counter{}
	exit, err := c.Exec(t.Context(), "box", []string{"cat"}, client.ExecOptions{Stdin: io.LimitReader(zeros{}, size), Stdout: out})
	if err != nil || exit != 0 || out.n != size {
		t.Errorf("exit %d, %d bytes, %v", exit, out.n, err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) { c.n += int64(len(p)); return len(p), nil }

func TestSessionExecEnds(t *testing.T) {
	c := session(t)
	_, err := c.Exec(t.Context(), "box", []string{"/bin/sh", "-c", "sleep 1000 & sleep 1000"}, client.ExecOptions{Timeout: 200 * time.Millisecond})
	if client.KindOf(err) != client.Timeout {
		t.Errorf("the timeout: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pidFile := filepath.Join(t.TempDir(), "pid")
	p, err := c.StartProcess(ctx, "box", []string{"/bin/sh", "-c", "sleep 1000 & echo $! >" + pidFile + "; wait"}, client.ExecOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var pid string
	poll(t, "the command is under way", func() bool {
		b, _ := os.ReadFile(pidFile)
		pid = strings.TrimSpace(string(b))
		return pid != ""
	})
	cancel()
	if _, err := p.Wait(); client.KindOf(err) != client.Canceled {
		t.Errorf("the cancel: %v", err)
	}
	poll(t, "its child is gone", func() bool {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
}

func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestSessionTerminal(t *testing.T) {
	c := session(t)
	resize := make(chan client.Size, 1)
	in, typed := io.Pipe()
	out := make(chan string, 256)
	p, err := c.StartProcess(t.Context(), "box", []string{"/bin/sh", "-c", `trap "stty size" WINCH; stty size; while :; do sleep 0.05; done`}, client.ExecOptions{
		TTY: &client.TTY{Size: client.Size{Cols: 101, Rows: 33}, Resize: resize}, Stdin: in,
		Stdout: writer(func(b []byte) { out <- string(b) }),
	})
	if err != nil {
		t.Skip("missing capability: pseudo-terminals: ", err)
	}
	done := make(chan struct{})
	var exit int
	go func() { defer close(done); exit, err = p.Wait() }()
	var all string
	until := func(want string) {
		t.Helper()
		deadline := time.After(20 * time.Second)
		for !strings.Contains(all, want) {
			select {
			case s := <-out:
				all += s
			case <-deadline:
				t.Fatalf("never saw %q in %q", want, all)
			}
		}
	}
	until("33 101")
	resize <- client.Size{Cols: 120, Rows: 50}
	until("50 120")
	if _, err := io.WriteString(typed, "\x03"); err != nil { // Ctrl-C
		t.Fatal(err)
	}
	<-done
	_ = typed.Close()
	if err != nil || exit != 130 {
		t.Errorf("exit %d, %v", exit, err)
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

func TestSessionCopies(t *testing.T) {
	c := session(t)
	ctx := t.Context()
	host, inside := t.TempDir(), t.TempDir()
	big := bytes.Repeat([]byte("0123456789abcdef"), 2<<20/16)
	old := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	for name, mode := range map[string]os.FileMode{"src/run.sh": 0o755, "src/sub/data": 0o640, "one": 0o444} {
		p := filepath.Join(host, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(os.WriteFile(p, big, 0o600), os.Chmod(p, mode), os.Chtimes(p, old, old)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../run.sh", filepath.Join(host, "src/sub/link")); err != nil {
		t.Fatal(err)
	}
	same := func(path string, mode os.FileMode) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(b, big) {
			t.Errorf("%s: %d bytes, %v", path, len(b), err)
			return
		}
		if st, _ := os.Stat(path); st.Mode() != mode || !st.ModTime().Equal(old) {
			t.Errorf("%s: %v, %v", path, st.Mode(), st.ModTime())
		}
	}
	to := func(local, remote string) {
		t.Helper()
		if _, err := c.CopyTo(ctx, "box", local, remote, client.CopyOptions{}); err != nil {
			t.Errorf("to %s: %v", remote, err)
		}
	}
	from := func(remote, local string) {
		t.Helper()
		if _, err := c.CopyFrom(ctx, "box", remote, local, client.CopyOptions{}); err != nil {
			t.Errorf("from %s: %v", remote, err)
		}
	}
	to(host+"/one", inside) // a file into a directory
	same(inside+"/one", 0o444)
	to(host+"/one", inside+"/new/name") // and to a name, over a missing parent
	same(inside+"/new/name", 0o444)
	to(host+"/one", inside+"/made/")
	same(inside+"/made/one", 0o444)
	to(host+"/src", inside) // a directory into one
	same(inside+"/src/run.sh", 0o755)
	to(host+"/src", inside+"/copy") // to a name
	same(inside+"/copy/sub/data", 0o640)
	to(host+"/src/.", inside+"/made") // its contents
	same(inside+"/made/run.sh", 0o755)
	if l, err := os.Readlink(inside + "/copy/sub/link"); l != "../run.sh" {
		t.Errorf("the link leads to %q, %v", l, err)
	}

	back := t.TempDir()
	from(inside+"/one", back)
	same(back+"/one", 0o444)
	from(inside+"/copy", back)
	same(back+"/copy/sub/data", 0o640)
	from(inside+"/copy", back+"/other")
	same(back+"/other/run.sh", 0o755)
	from(inside+"/copy/.", back)
	same(back+"/run.sh", 0o755)
	from(inside+"/copy/sub/link", back+"/followed")
	same(back+"/followed", 0o755)

	for name, err := range map[string]error{
		"no such file inside":   second(c.CopyFrom(ctx, "box", inside+"/nothing", back, client.CopyOptions{})),
		"no such file here":     second(c.CopyTo(ctx, "box", host+"/nothing", inside, client.CopyOptions{})),
		"no such workspace":     second(c.CopyTo(ctx, "nobody", host+"/one", inside, client.CopyOptions{})),
		"no such user":          second(c.CopyTo(ctx, "box", host+"/one", inside, client.CopyOptions{User: "no-such-user"})),
		"directory over a file": second(c.CopyTo(ctx, "box", host+"/src", inside+"/one", client.CopyOptions{})),
	} {
		t.Logf("%s: %v", name, err)
		if k := client.KindOf(err); k != client.NotFound && k != client.Unauthorized && k != client.Invalid {
			t.Errorf("%s: %v (%s)", name, err, k)
		}
	}
}

func second(_ client.Copied, err error) error { return err }

func TestSessionStreams(t *testing.T) {
	c := session(t)
	ctx := t.Context()
	dir := t.TempDir()
	if err := c.WriteFile(ctx, "box", dir+"/a/b", "", strings.NewReader("text")); err != nil {
		t.Fatal(err)
	}
	r, size, err := c.ReadFile(ctx, "box", dir+"/a/b", "")
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	_ = r.Close()
	if string(b) != "text" || err != nil || size != 4 {
		t.Errorf("%q of %d, %v", b, size, err)
	}
	r, err = c.ReadArchive(ctx, "box", dir+"/a", "")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var names []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				t.Error(err)
			}
			break
		}
		names = append(names, h.Name)
	}
	if strings.Join(names, " ") != "./ ./b" && strings.Join(names, " ") != "./ b" {
		t.Errorf("entries %q", names)
	}
	if st, err := c.Stat(ctx, "box", dir+"/a", ""); err != nil || st.Type != client.TypeDirectory {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestSessionDial(t *testing.T) {
	c := session(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skip("missing capability: loopback: ", err)
	}
	defer l.Close()
	go func() { // ends with the listener
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		b, _ := io.ReadAll(conn) // up to the half-close
		_, _ = conn.Write(bytes.ToUpper(b))
	}()
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	conn, err := c.DialTCP(t.Context(), "box", port, "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); string(b) != "HELLO" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	_ = l.Close()
	if _, err := c.DialTCP(t.Context(), "box", port, ""); client.KindOf(err) != client.Unavailable {
		t.Errorf("a closed port: %v", err)
	}
}
