package server_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	agentisov1 "github.com/agentiso/agentiso/api/agentiso/v1"
	"github.com/agentiso/agentiso/api/agentiso/v1/agentisov1connect"
	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/server"
	"github.com/agentiso/agentiso/internal/server/servertest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// httpClient talks to d's socket; h2 speaks HTTP/2 without TLS.
func httpClient(t *testing.T, d *servertest.Daemon, h2 bool) *http.Client {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.Socket)
	}}
	if h2 {
		tr.Protocols = new(http.Protocols)
		tr.Protocols.SetUnencryptedHTTP2(true)
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func workspaces(t *testing.T, d *servertest.Daemon, h2 bool) agentisov1connect.WorkspaceServiceClient {
	t.Helper()
	return agentisov1connect.NewWorkspaceServiceClient(httpClient(t, d, h2), "http://agentiso")
}

func create(t *testing.T, d *servertest.Daemon, name string) string {
	t.Helper()
	res, err := workspaces(t, d, false).Create(t.Context(), connect.NewRequest(&agentisov1.CreateRequest{Name: name}))
	if err != nil {
		t.Fatal(err)
	}
	return res.Msg.GetWorkspace().GetId()
}

func info(err error) *agentisov1.ErrorInfo {
	ce, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return nil
	}
	for _, d := range ce.Details() {
		if v, err := d.Value(); err == nil {
			if i, ok := v.(*agentisov1.ErrorInfo); ok {
				return i
			}
		}
	}
	return nil
}

func TestErrorsCarryKindAndNextStep(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		d := servertest.Start(t, nil)
		_, err := workspaces(t, d, h2).Get(t.Context(), connect.NewRequest(&agentisov1.GetRequest{Ref: "nobody"}))
		if connect.CodeOf(err) != connect.CodeNotFound {
			t.Fatalf("code is %v (%v)", connect.CodeOf(err), err)
		}
		i := info(err)
		if i.GetKind() != string(fault.NotFound) || i.GetNext() == "" {
			t.Errorf("detail is %v", i)
		}
	}
}

func TestPanicIsAnErrorWithTheRequestID(t *testing.T) {
	d := servertest.Start(t, nil)
	d.System.Panic = true
	c := agentisov1connect.NewSystemServiceClient(httpClient(t, d, false), "http://agentiso")
	req := connect.NewRequest(&agentisov1.DoctorRequest{})
	req.Header().Set("X-Request-Id", "my-request")
	_, err := c.Doctor(t.Context(), req)
	if connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(info(err).GetNext(), "my-request") {
		t.Fatalf("error is %v, next %q", err, info(err).GetNext())
	}
	if strings.Contains(err.Error(), "ill") {
		t.Errorf("the panic's value reached the caller: %v", err)
	}
	d.System.Panic = false
	if _, err := c.Info(t.Context(), connect.NewRequest(&agentisov1.InfoRequest{})); err != nil {
		t.Errorf("the daemon did not survive: %v", err)
	}
}

func TestHoldDestroysWhenTheClientGoesAway(t *testing.T) {
	d := servertest.Start(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := workspaces(t, d, false).Hold(ctx, connect.NewRequest(&agentisov1.HoldRequest{Create: &agentisov1.CreateRequest{}}))
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() || !stream.Msg().GetWorkspace().GetEphemeral() {
		t.Fatalf("no ephemeral workspace: %v, %v", stream.Msg(), stream.Err())
	}
	if d.Workspaces.Count() != 1 {
		t.Fatal("the workspace does not exist while it is held")
	}
	cancel() // as the end of the client's process: the connection closes
	_ = stream.Close()
	eventually(t, "the workspace is destroyed", func() bool { return d.Workspaces.Count() == 0 })
}

func TestShutdownDestroysHeldWorkspacesAndSaysWhy(t *testing.T) {
	d := servertest.Start(t, nil)
	stream, err := workspaces(t, d, false).Hold(t.Context(), connect.NewRequest(&agentisov1.HoldRequest{Create: &agentisov1.CreateRequest{}}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	create(t, d, "kept")
	d.Stop(t)
	if stream.Receive() || connect.CodeOf(stream.Err()) != connect.CodeUnavailable || info(stream.Err()).GetNext() == "" {
		t.Errorf("the stream ended with %v", stream.Err())
	}
	if n := d.Workspaces.Count(); n != 1 {
		t.Errorf("%d workspaces are left, not the one that was not held", n)
	}
}

// A create that cannot be undone at once must not keep its caller waiting.
func TestShutdownAnswersBeforeTheUndoingEnds(t *testing.T) {
	d := servertest.Start(t, nil)
	d.Workspaces.CreateGate, d.Workspaces.UndoGate = make(chan struct{}), make(chan struct{})
	answer := make(chan error, 1)
	go func() {
		_, err := workspaces(t, d, false).Create(context.Background(), connect.NewRequest(&agentisov1.CreateRequest{}))
		answer <- err
	}()
	c := httpClient(t, d, false)
	eventually(t, "the call arrived", func() bool { return strings.Contains(get(t, c, "/metrics"), "agentiso_api_call") })
	stopped := make(chan struct{})
	go func() { d.Stop(t); close(stopped) }()
	err := <-answer // the gate of the undoing is still shut
	if connect.CodeOf(err) != connect.CodeUnavailable || !strings.Contains(err.Error(), "shutting down") {
		t.Errorf("answer is %v", err)
	}
	select {
	case <-stopped:
		t.Error("Shutdown did not wait for the undoing")
	default:
	}
	close(d.Workspaces.UndoGate)
	<-stopped
}

func get(t *testing.T, c *http.Client, path string) string {
	t.Helper()
	res, err := c.Get("http://agentiso" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, _ := io.ReadAll(res.Body)
	return string(b)
}

func TestFollowedLogsEndWithTheDaemon(t *testing.T) {
	d := servertest.Start(t, nil)
	create(t, d, "a")
	stream, err := workspaces(t, d, false).Logs(t.Context(), connect.NewRequest(&agentisov1.LogsRequest{Ref: "a", Follow: true}))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if !stream.Receive() || string(stream.Msg().GetData()) != "booting a\n" {
		t.Fatalf("logs begin with %q, %v", stream.Msg().GetData(), stream.Err())
	}
	d.Stop(t)
	if stream.Receive() || connect.CodeOf(stream.Err()) != connect.CodeUnavailable {
		t.Errorf("the stream ended with %v", stream.Err())
	}
}

func TestUploadThatStallsDoesNotHoldUpShutdown(t *testing.T) {
	d := servertest.Start(t, nil)
	r, w := io.Pipe()
	defer w.Close()
	type result struct {
		res *http.Response
		err error
	}
	done := make(chan result, 1)
	c := httpClient(t, d, false)
	go func() {
		res, err := c.Post("http://agentiso/images/import?name=x", "application/x-tar", r)
		done <- result{res, err}
	}()
	if _, err := w.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	d.Stop(t)
	got := <-done
	if got.err != nil {
		t.Fatalf("no answer: %v", got.err)
	}
	defer got.res.Body.Close()
	var e struct{ Kind, Message string }
	if err := json.NewDecoder(got.res.Body).Decode(&e); err != nil || e.Kind != string(fault.Unavailable) {
		t.Errorf("answer is %d %+v (%v)", got.res.StatusCode, e, err)
	}
}

func TestPlainPaths(t *testing.T) {
	d := servertest.Start(t, nil)
	c := httpClient(t, d, false)
	create(t, d, "a")
	for path, want := range map[string]int{
		"/healthz":                       204,
		"/metrics":                       200,
		"/nowhere":                       404,
		"/workspaces/a/agent/envs":       200,
		"/workspaces/a/agent/etc/passwd": 404,
		"/workspaces/b/agent/envs":       404,
		"/workspaces/a/agent/agentiso.guest.v1.Guest/Shutdown":                    404,
		"/workspaces/a/agent/process.Process/%2e%2e/agentiso.guest.v1.Guest/Info": 404,
		"/workspaces/a/agent/tcp?port=0":                                          400,
		"/workspaces/a/agent/tcp?port=80":                                         400, // without the upgrade
	} {
		res, err := c.Get("http://agentiso" + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("GET %s: %d, not %d", path, res.StatusCode, want)
		}
		if res.Header.Get("X-Request-Id") == "" {
			t.Errorf("GET %s: no request id", path)
		}
	}
	m := get(t, c, "/metrics")
	if strings.Contains(m, "nowhere") || !strings.Contains(m, `op="agent/envs"`) {
		t.Errorf("labels are not bounded:\n%s", m)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "a.sock")
	l, err := server.Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	if st, err := os.Stat(filepath.Dir(path)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, %v", st.Mode(), err)
	}
	if _, err := server.Listen(path, ""); !fault.Is(err, fault.InUse) {
		t.Errorf("a second daemon on the socket: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) > 0 {
		t.Errorf("Close left %v", left)
	}

	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	_ = stale.Close()
	l, err = server.Listen(path, "")
	if err != nil {
		t.Fatalf("over a stale socket: %v", err)
	}
	_ = l.Close()

	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]struct {
		path, group string
		kind        fault.Kind
	}{
		"a file":        {file, "", fault.InUse},
		"too long":      {filepath.Join(dir, strings.Repeat("x", 120)), "", fault.Invalid},
		"no such group": {path, "no-such-group", fault.Invalid},
	} {
		if l, err := server.Listen(try.path, try.group); !fault.Is(err, try.kind) {
			t.Errorf("%s: %v", name, err)
			if l != nil {
				_ = l.Close()
			}
		}
	}
}

// Closing a listener whose name another has taken leaves that other's socket.
func TestListenerRemovesOnlyItsOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := server.Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := server.Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	_ = l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the other's socket is gone: %v", err)
	}
}

// eventually polls until ok or, much later, fails.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}
