package files

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/goleak"

	"github.com/agentiso/agentiso/api/filesystem/filesystemconnect"
	"github.com/agentiso/agentiso/internal/guest/access"
	"github.com/agentiso/agentiso/internal/guest/users"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The users of every test; alice is the default user.
const (
	aliceID = 60001
	bobID   = 60002
)

// world is a service over a real directory, with users of its own.
type world struct {
	t     testing.TB
	dir   string // everybody may enter and write
	home  string // alice's
	token string
	svc   *Service
	url   string
	http  *http.Client
}

func newWorld(t testing.TB) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root")
	}
	// t.TempDir cannot be entered by others.
	dir, err := os.MkdirTemp("", "files")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, home: filepath.Join(dir, "alice")}
	w.must(os.Chmod(dir, 0o777))
	for name, id := range map[string]int{"alice": aliceID, "bob": bobID} {
		home := filepath.Join(dir, name)
		w.must(os.Mkdir(home, 0o755))
		w.must(os.Chown(home, id, id))
	}
	etc := t.TempDir()
	accounts := users.DB{Passwd: filepath.Join(etc, "passwd"), Group: filepath.Join(etc, "group")}
	w.must(os.WriteFile(accounts.Passwd, fmt.Appendf(nil,
		"root:x:0:0::/root:/bin/sh\nalice:x:%d:%d::%s:/bin/sh\nbob:x:%d:%d::%s:/bin/sh\n",
		aliceID, aliceID, w.home, bobID, bobID, filepath.Join(dir, "bob")), 0o644))
	w.must(os.WriteFile(accounts.Group, fmt.Appendf(nil,
		"root:x:0:\nalice:x:%d:\nbob:x:%d:\n", aliceID, bobID), 0o644))

	w.svc = New(Options{
		Lookup: func(name string) (users.User, error) {
			if name == "" {
				name = "alice"
			}
			return accounts.Lookup(name)
		},
		Token:    func() string { return w.token },
		Accounts: accounts,
		Log:      slog.New(slog.DiscardHandler),
	})
	mux := http.NewServeMux()
	mux.Handle("/files", w.svc)
	mux.Handle("/files/", w.svc)
	path, h := filesystemconnect.NewFilesystemHandler(w.svc)
	mux.HandleFunc(path, func(rw http.ResponseWriter, r *http.Request) {
		name, err := access.User(r)
		if err != nil {
			t.Error(err)
		}
		u, err := w.svc.opt.Lookup(name)
		if err != nil {
			t.Error(err)
		}
		h.ServeHTTP(rw, r.WithContext(users.NewContext(r.Context(), u)))
	})
	srv := httptest.NewUnstartedServer(mux)
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	srv.Start()
	tr := &http.Transport{DisableCompression: true}
	t.Cleanup(func() {
		w.must(w.svc.Close())
		tr.CloseIdleConnections()
		srv.Close()
	})
	w.url, w.http = srv.URL, &http.Client{Transport: tr}
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// at is w within a subtest.
func (w *world) at(t testing.TB) *world {
	sub := *w
	sub.t = t
	return &sub
}

// put writes a file as root.
func (w *world) put(name, text string, mode os.FileMode, id int) string {
	w.t.Helper()
	p := filepath.Join(w.dir, name)
	w.must(os.MkdirAll(filepath.Dir(p), 0o755))
	w.must(os.WriteFile(p, []byte(text), 0o600))
	w.must(os.Chown(p, id, id))
	w.must(os.Chmod(p, mode))
	return p
}

func (w *world) get(p string) string {
	w.t.Helper()
	b, err := os.ReadFile(p)
	w.must(err)
	return string(b)
}

func (w *world) gone(p string) {
	w.t.Helper()
	if _, err := os.Lstat(p); !errors.Is(err, os.ErrNotExist) {
		w.t.Errorf("%s is there (%v), want it gone", p, err)
	}
}

func (w *world) owner(p string) (uid int, mode os.FileMode) {
	w.t.Helper()
	fi, err := os.Lstat(p)
	w.must(err)
	return int(fi.Sys().(*syscall.Stat_t).Uid), fi.Mode()
}

// client speaks the filesystem service as a user.
func (w *world) client(user string) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(w.http, w.url, connect.WithInterceptors(asUser(user)))
}

type asUser string

func (u asUser) header() string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(string(u)+":"))
}

func (u asUser) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		req.Header().Set("Authorization", u.header())
		return next(ctx, req)
	}
}

func (u asUser) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		c := next(ctx, spec)
		c.RequestHeader().Set("Authorization", u.header())
		return c
	}
}

func (u asUser) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// call is one plain HTTP request with its answer.
type call struct {
	method, path string
	query        url.Values
	header       map[string]string
	body         io.Reader
}

type reply struct {
	*http.Response
	text string
}

func (w *world) do(c call) reply {
	w.t.Helper()
	req, err := http.NewRequestWithContext(w.t.Context(), c.method, w.url+c.path+"?"+c.query.Encode(), c.body)
	w.must(err)
	for k, v := range c.header {
		req.Header.Set(k, v)
	}
	resp, err := w.http.Do(req)
	w.must(err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	w.must(err)
	return reply{resp, string(b)}
}

// want checks a status and, for an error, that the answer is one.
func (w *world) want(r reply, status int) {
	w.t.Helper()
	if r.StatusCode != status {
		w.t.Fatalf("status %d, want %d: %.300s", r.StatusCode, status, r.text)
	}
	if status < 400 {
		return
	}
	var e struct {
		Code    int
		Message string
	}
	if err := json.Unmarshal([]byte(r.text), &e); err != nil || e.Code != status || e.Message == "" {
		w.t.Errorf("answer %q is not the JSON of an error: %v", r.text, err)
	}
}

func q(pairs ...string) url.Values {
	v := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		v.Set(pairs[i], pairs[i+1])
	}
	return v
}

// octets is an upload of one file as it is.
func octets(user, path, text string) call {
	return call{"POST", "/files", q("path", path, "username", user),
		map[string]string{"Content-Type": "application/octet-stream"}, strings.NewReader(text)}
}

func pattern(n int) []byte {
	b := bytes.Repeat([]byte("0123456789abcdef\n"), n/17+1)
	for i := 0; i < n; i += 4096 {
		b[i] = byte(i >> 12)
	}
	return b[:n]
}

func code(err error) connect.Code {
	if err == nil {
		return 0
	}
	return connect.CodeOf(err)
}

// eventually waits for what another goroutine or the kernel is about to do.
func eventually(t testing.TB, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
		time.Sleep(2 * time.Millisecond)
	}
}
