package guest

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/api/agentiso/guest/v1/guestv1connect"
	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/api/filesystem/filesystemconnect"
	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/api/process/processconnect"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/users"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// proc answers List with the user's name as a tag, and panics when told to.
type proc struct {
	processconnect.UnimplementedProcessHandler
}

func (proc) List(ctx context.Context, _ *connect.Request[process.ListRequest]) (*connect.Response[process.ListResponse], error) {
	u, ok := users.FromContext(ctx)
	if !ok {
		return nil, connect.NewError(connect.CodeInternal, io.EOF)
	}
	return connect.NewResponse(&process.ListResponse{Processes: []*process.ProcessInfo{{Tag: &u.Name}}}), nil
}

func (proc) Update(context.Context, *connect.Request[process.UpdateRequest]) (*connect.Response[process.UpdateResponse], error) {
	panic("update")
}

type host struct {
	guestv1connect.UnimplementedGuestHandler
}

type guest struct {
	*Server
	url  string
	http *http.Client
}

// serve starts a server whose only user beside root is the test's own, "me".
func serve(t *testing.T, who identity.Snapshot) guest {
	t.Helper()
	dir := t.TempDir()
	accounts := users.DB{Passwd: filepath.Join(dir, "passwd"), Group: filepath.Join(dir, "none")}
	me := "me:x:" + itoa(os.Geteuid()) + ":" + itoa(os.Getegid()) + "::" + dir + ":/bin/sh\n"
	if err := os.WriteFile(accounts.Passwd, []byte("root:x:0:0::/root:/bin/sh\n"+me), 0o600); err != nil {
		t.Fatal(err)
	}
	s := New(Options{
		Identity: identity.NewStore(who),
		Accounts: accounts,
		Process:  proc{},
		Guest:    host{},
		Connect:  http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }),
		Log:      slog.New(slog.DiscardHandler),
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	tr := &http.Transport{}
	t.Cleanup(func() {
		tr.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return guest{s, "http://" + l.Addr().String(), &http.Client{Transport: tr}}
}

func itoa(n int) string { b, _ := json.Marshal(n); return string(b) }

func basic(name string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"))
}

// call returns status and body of a request with headers "Key: value".
func (g guest) call(t *testing.T, method, path, body string, headers ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, g.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(body, "{") {
		req.Header.Set("Content-Type", "application/json")
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	resp, err := g.http.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if got := resp.Header.Get("Server"); got != "agentiso-guest/0.6.4" {
		t.Errorf("Server header %q", got)
	}
	return resp.StatusCode, string(b)
}

func TestWhoMayCall(t *testing.T) {
	const (
		list   = "/process.Process/List"
		stat   = "/filesystem.Filesystem/Stat"
		info   = "/agentiso.guest.v1.Guest/Info"
		tunnel = "/agentiso.guest.v1.Guest/Connect?port=1"
	)
	open := identity.Snapshot{DefaultUser: "me"}
	secure := identity.Snapshot{DefaultUser: "me", AccessToken: "secret"}
	nobody := identity.Snapshot{DefaultUser: "gone"}
	const token = "X-Access-Token: secret"
	tests := []struct {
		name               string
		who                identity.Snapshot
		method, path, body string
		headers            []string
		status             int
		contains           string
	}{
		{"health", open, "GET", "/health", "", nil, 204, ""},
		{"health of secure", secure, "GET", "/health", "", nil, 204, ""},
		{"health posted", open, "POST", "/health", "", nil, 405, ""},
		{"host", secure, "POST", info, "{}", nil, 501, "unimplemented"},
		{"host, no such user", nobody, "POST", info, "{}", []string{"Authorization: " + basic("eve")}, 501, "unimplemented"},
		{"tunnel", secure, "GET", tunnel, "", nil, 418, ""},
		{"default user", open, "POST", list, "{}", nil, 200, `"tag":"me"`},
		{"named user", open, "POST", list, "{}", []string{"Authorization: " + basic("root")}, 200, `"tag":"root"`},
		{"user of a number", open, "POST", list, "{}", []string{"Authorization: " + basic("4711")}, 200, `"tag":"4711"`},
		{"another scheme", open, "POST", list, "{}", []string{"Authorization: Bearer x"}, 200, `"tag":"me"`},
		{"unknown user", open, "POST", list, "{}", []string{"Authorization: " + basic("eve")}, 401, `"code":"unauthenticated"`},
		{"unknown default user", nobody, "POST", list, "{}", nil, 401, `"code":"unauthenticated"`},
		{"broken header", open, "POST", list, "{}", []string{"Authorization: Basic ?"}, 401, `"code":"unauthenticated"`},
		{"no token", secure, "POST", list, "{}", nil, 401, `"code":"unauthenticated"`},
		{"wrong token", secure, "POST", list, "{}", []string{"X-Access-Token: Secret"}, 401, `"code":"unauthenticated"`},
		{"token", secure, "POST", list, "{}", []string{token}, 200, `"tag":"me"`},
		{"files without token", secure, "POST", stat, `{"path":"/"}`, nil, 401, `"code":"unauthenticated"`},
		{"files with token", secure, "POST", stat, `{"path":"/"}`, []string{token}, 200, `"FILE_TYPE_DIRECTORY"`},
		{"metrics without token", secure, "GET", "/metrics", "", nil, 401, `"code":401`},
		{"metrics", secure, "GET", "/metrics", "", []string{token}, 200, `"mem_total"`},
		{"envs without token", secure, "GET", "/envs", "", nil, 401, `"code":401`},
		{"envs", open, "GET", "/envs", "", nil, 200, "{}"},
		{"download unsigned", secure, "GET", "/files?path=/etc/passwd", "", nil, 401, "missing signature"},
		{"download", secure, "GET", "/files?path=passwd", "", []string{token}, 200, "me:x:"},
		{"compose without token", secure, "POST", "/files/compose", "{}", nil, 401, `"code":401`},
		{"compose", secure, "POST", "/files/compose", "{}", []string{token}, 400, "source_paths"},
		{"archive without token", secure, "GET", "/files/archive?path=x", "", nil, 401, `"code":401`},
		{"nothing there", open, "GET", "/nothing", "", nil, 404, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := serve(t, tt.who)
			status, body := g.call(t, tt.method, tt.path, tt.body, tt.headers...)
			if status != tt.status || !strings.Contains(strings.ReplaceAll(body, " ", ""), strings.ReplaceAll(tt.contains, " ", "")) {
				t.Errorf("got %d %s, want %d with %s", status, body, tt.status, tt.contains)
			}
		})
	}
}

func TestEnvs(t *testing.T) {
	want := map[string]string{"A": "1", "PATH": "/bin"}
	g := serve(t, identity.Snapshot{Env: want})
	_, body := g.call(t, "GET", "/envs", "")
	var got map[string]string
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestPanics(t *testing.T) {
	g := serve(t, identity.Snapshot{DefaultUser: "me"})
	for range 2 {
		if status, body := g.call(t, "POST", "/process.Process/Update", "{}"); status != 500 || !strings.Contains(body, "internal") {
			t.Errorf("got %d %s", status, body)
		}
	}
	h := g.recovering(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("plain") }))
	defer func() {
		if v := recover(); v != http.ErrAbortHandler {
			t.Errorf("recovered %v, want http.ErrAbortHandler", v)
		}
	}()
	h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
}

func TestMessageLimit(t *testing.T) {
	g := serve(t, identity.Snapshot{DefaultUser: "me"})
	body := `{"path":"` + strings.Repeat("x", maxMessage) + `"}`
	if status, got := g.call(t, "POST", "/filesystem.Filesystem/Stat", body); status != 429 || !strings.Contains(got, "resource_exhausted") {
		t.Errorf("got %d %.200s", status, got)
	}
}

// Both versions of HTTP carry a stream, and Close ends it.
func TestCloseEndsWatches(t *testing.T) {
	for _, h2 := range []bool{false, true} {
		t.Run(map[bool]string{false: "HTTP/1.1", true: "h2c"}[h2], func(t *testing.T) {
			g := serve(t, identity.Snapshot{DefaultUser: "me"})
			var p http.Protocols
			p.SetHTTP1(!h2)
			p.SetUnencryptedHTTP2(h2)
			tr := &http.Transport{Protocols: &p}
			defer tr.CloseIdleConnections()
			c := filesystemconnect.NewFilesystemClient(&http.Client{Transport: tr}, g.url)
			stream, err := c.WatchDir(t.Context(), connect.NewRequest(&filesystem.WatchDirRequest{Path: t.TempDir()}))
			if err != nil {
				t.Fatal(err)
			}
			defer stream.Close()
			if !stream.Receive() {
				t.Fatal(stream.Err())
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := g.Close(ctx); err != nil {
				t.Error(err)
			}
			if stream.Receive() || stream.Err() != nil {
				t.Errorf("stream went on or failed: %v", stream.Err())
			}
		})
	}
}
