package files

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/internal/guest/users"
)

var kindNames = map[filesystem.EventType]string{
	filesystem.EventType_EVENT_TYPE_CREATE: "create",
	filesystem.EventType_EVENT_TYPE_WRITE:  "write",
	filesystem.EventType_EVENT_TYPE_REMOVE: "remove",
	filesystem.EventType_EVENT_TYPE_RENAME: "rename",
	filesystem.EventType_EVENT_TYPE_CHMOD:  "chmod",
}

func text(e *filesystem.FilesystemEvent) string { return kindNames[e.GetType()] + " " + e.GetName() }

// poller is a watcher of the polled kind under test.
type poller struct {
	*world
	id  string
	got []string
	raw []*filesystem.FilesystemEvent
}

func (w *world) watch(user string, req *filesystem.CreateWatcherRequest) (*poller, error) {
	resp, err := w.client(user).CreateWatcher(w.t.Context(), connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return &poller{world: w, id: resp.Msg.GetWatcherId()}, nil
}

func (p *poller) poll() error {
	resp, err := p.client("alice").GetWatcherEvents(p.t.Context(), connect.NewRequest(&filesystem.GetWatcherEventsRequest{WatcherId: p.id}))
	if err != nil {
		return err
	}
	for _, e := range resp.Msg.GetEvents() {
		p.got, p.raw = append(p.got, text(e)), append(p.raw, e)
	}
	return nil
}

// until polls until the event has come.
func (p *poller) until(want string) {
	p.t.Helper()
	eventually(p.t, func() bool {
		if err := p.poll(); err != nil {
			p.t.Fatalf("waiting for %q: %v; got %q", want, err, p.got)
		}
		return slices.Contains(p.got, want)
	})
}

func (p *poller) count(want string) int {
	n := 0
	for _, e := range p.got {
		if e == want {
			n++
		}
	}
	return n
}

func TestWatchEvents(t *testing.T) {
	w := newWorld(t)
	w.put("alice/d/there", "x", 0o644, aliceID)
	p, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "d"})
	w.must(err)
	d := filepath.Join(w.home, "d")
	for _, step := range []struct {
		do   func() error
		want string
	}{
		{func() error { return os.WriteFile(d+"/new", nil, 0o644) }, "create new"},
		{func() error { return os.WriteFile(d+"/there", []byte("more"), 0o644) }, "write there"},
		{func() error { return os.Chmod(d+"/there", 0o600) }, "chmod there"},
		{func() error { return os.Rename(d+"/there", d+"/moved") }, "rename there"},
		{func() error { return nil }, "create moved"},
		{func() error { return os.Remove(d + "/moved") }, "remove moved"},
		{func() error { return os.Mkdir(d+"/sub", 0o755) }, "create sub"},
		{func() error { return os.WriteFile(d+"/sub/unseen", nil, 0o644) }, ""},
		{func() error { return os.Chmod(d, 0o700) }, "chmod ."},
	} {
		w.must(step.do())
		if step.want != "" {
			p.until(step.want)
		}
	}
	if p.count("create sub/unseen") != 0 {
		t.Errorf("a watch that is not recursive told of a subdirectory: %q", p.got)
	}
	w.must(os.RemoveAll(d))
	p.until("remove .")
	eventually(t, func() bool { return p.poll() != nil })
	if err := p.poll(); code(err) != connect.CodeFailedPrecondition {
		t.Errorf("after the directory has gone: %v", err)
	}
	rm := connect.NewRequest(&filesystem.RemoveWatcherRequest{WatcherId: p.id})
	if _, err := w.client("alice").RemoveWatcher(t.Context(), rm); err != nil {
		t.Error(err)
	}
	if _, err := w.client("alice").RemoveWatcher(t.Context(), rm); code(err) != connect.CodeNotFound {
		t.Errorf("removed twice: %v", err)
	}
	if err := p.poll(); code(err) != connect.CodeNotFound {
		t.Errorf("polled after removal: %v", err)
	}
}

func TestWatchRecursive(t *testing.T) {
	w := newWorld(t)
	w.put("alice/d/sub/deep/f", "x", 0o644, aliceID)
	p, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "d", Recursive: true})
	w.must(err)
	d := filepath.Join(w.home, "d")
	w.must(os.WriteFile(d+"/sub/deep/f", []byte("y"), 0o644))
	p.until("write sub/deep/f")

	// What is in a new directory before it can be watched is told all the same,
	// and once.
	for i := range 50 {
		dir := fmt.Sprintf("n%d/a/b", i)
		w.must(os.MkdirAll(filepath.Join(d, dir), 0o755))
		w.must(os.WriteFile(filepath.Join(d, dir, "f"), []byte("x"), 0o644))
	}
	for i := range 50 {
		for _, name := range []string{"", "/a", "/a/b", "/a/b/f"} {
			want := fmt.Sprintf("create n%d%s", i, name)
			p.until(want)
			if n := p.count(want); n != 1 {
				t.Errorf("%q came %d times", want, n)
			}
		}
		p.until(fmt.Sprintf("write n%d/a/b/f", i))
	}

	w.must(os.Rename(d+"/n1", d+"/moved"))
	p.until("rename n1")
	p.until("create moved")
	w.must(os.WriteFile(d+"/moved/a/b/g", nil, 0o644))
	p.until("create moved/a/b/g")

	out := filepath.Join(w.home, "outside")
	w.must(os.Rename(d+"/n2", out))
	p.until("rename n2")
	w.must(os.WriteFile(out+"/a/unseen", nil, 0o644))
	w.must(os.RemoveAll(d + "/n3"))
	p.until("remove n3")
	w.must(os.MkdirAll(d+"/n3/a", 0o755))
	w.must(os.WriteFile(d+"/last", nil, 0o644))
	p.until("create last")
	for _, e := range p.got {
		if filepath.Base(e) == "unseen" {
			t.Errorf("%q is outside", e)
		}
	}
	if n := p.count("create n3/a"); n != 2 {
		t.Errorf("a directory made twice was told of %d times", n)
	}
}

func TestWatchEntry(t *testing.T) {
	w := newWorld(t)
	w.put("alice/d/going", "x", 0o644, aliceID)
	p, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "d", IncludeEntry: true})
	w.must(err)
	w.put("alice/d/f", "hello", 0o644, aliceID)
	w.must(os.Remove(w.home + "/d/going"))
	p.until("create f")
	p.until("remove going")
	for i, e := range p.raw {
		switch p.got[i] {
		case "create f":
			if e.GetEntry().GetPath() != w.home+"/d/f" || e.GetEntry().GetType() != filesystem.FileType_FILE_TYPE_FILE {
				t.Errorf("entry %v", e.GetEntry())
			}
		case "remove going":
			if e.GetEntry() != nil {
				t.Errorf("what has gone has the entry %v", e.GetEntry())
			}
		}
	}
}

func TestWatchErrors(t *testing.T) {
	w := newWorld(t)
	w.put("alice/file", "x", 0o644, aliceID)
	w.put("bob/closed/x", "x", 0o600, bobID)
	w.must(os.Chmod(filepath.Join(w.dir, "bob/closed"), 0o700))
	for p, want := range map[string]connect.Code{
		"none":          connect.CodeNotFound,
		"file":          connect.CodeInvalidArgument,
		"../bob/closed": connect.CodePermissionDenied,
		"nul\x00":       connect.CodeInvalidArgument,
	} {
		if _, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: p}); code(err) != want {
			t.Errorf("%q: %v, want %v", p, err, want)
		}
	}
	for range maxPolled {
		_, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "."})
		w.must(err)
	}
	if _, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "."}); code(err) != connect.CodeResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	// One that nobody has asked for an hour makes room.
	w.svc.mu.Lock()
	for _, p := range w.svc.watchers {
		p.mu.Lock()
		p.polled = p.polled.Add(-2 * idlePolled)
		p.mu.Unlock()
		break
	}
	w.svc.mu.Unlock()
	if _, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "."}); err != nil {
		t.Error(err)
	}
	w.must(w.svc.Close())
	if _, err := w.watch("alice", &filesystem.CreateWatcherRequest{Path: "."}); code(err) != connect.CodeUnavailable {
		t.Errorf("after Close: %v", err)
	}
}

func TestWatchStream(t *testing.T) {
	w := newWorld(t)
	w.must(os.Mkdir(w.home+"/d", 0o755))
	ctx, cancel := context.WithCancel(t.Context())
	req := connect.NewRequest(&filesystem.WatchDirRequest{Path: "d"})
	req.Header().Set(keepaliveHeader, "1")
	stream, err := w.client("alice").WatchDir(ctx, req)
	w.must(err)
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		t.Fatalf("first message %v, %v", stream.Msg(), stream.Err())
	}
	w.put("alice/d/f", "", 0o644, aliceID)
	var got, alive bool
	for !(got && alive) && stream.Receive() {
		if e := stream.Msg().GetFilesystem(); e != nil && text(e) == "create f" {
			got = true
		}
		alive = alive || stream.Msg().GetKeepalive() != nil
	}
	if !got || !alive {
		t.Errorf("event %v, keepalive %v, %v", got, alive, stream.Err())
	}
	cancel()
	for stream.Receive() {
	}
	if code(stream.Err()) != connect.CodeCanceled {
		t.Errorf("canceled stream ended with %v", stream.Err())
	}
	stream.Close()
	eventually(t, func() bool { w.svc.mu.Lock(); defer w.svc.mu.Unlock(); return len(w.svc.streams) == 0 })

	stream, err = w.client("alice").WatchDir(t.Context(), connect.NewRequest(&filesystem.WatchDirRequest{Path: "d"}))
	w.must(err)
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	w.must(os.RemoveAll(w.home + "/d"))
	last := ""
	for stream.Receive() {
		last = text(stream.Msg().GetFilesystem())
	}
	if last != "remove ." || stream.Err() != nil {
		t.Errorf("the end: %q, %v", last, stream.Err())
	}

	stream, err = w.client("alice").WatchDir(t.Context(), connect.NewRequest(&filesystem.WatchDirRequest{Path: "none"}))
	w.must(err)
	defer stream.Close()
	if stream.Receive() || code(stream.Err()) != connect.CodeNotFound {
		t.Errorf("watch of nothing: %v", stream.Err())
	}
}

// Close ends a stream whose caller does not read.
func TestWatchStreamClose(t *testing.T) {
	w := newWorld(t)
	stream, err := w.client("alice").WatchDir(t.Context(), connect.NewRequest(&filesystem.WatchDirRequest{Path: "."}))
	w.must(err)
	defer stream.Close()
	if !stream.Receive() {
		t.Fatal(stream.Err())
	}
	for i := range 2000 {
		w.must(os.WriteFile(fmt.Sprintf("%s/%d", w.home, i), nil, 0o600))
	}
	w.must(w.svc.Close())
	for stream.Receive() {
	}
	if err := stream.Err(); err != nil {
		t.Errorf("stream ended with %v", err)
	}
}

func TestPolledOverflow(t *testing.T) {
	p := &polled{w: &watcher{done: make(chan struct{})}}
	more := true
	for i := 0; more; i++ {
		for range 3 { // equal writes in a row are one
			more = p.put(&filesystem.FilesystemEvent{Name: fmt.Sprint(i), Type: filesystem.EventType_EVENT_TYPE_WRITE}, nil)
		}
	}
	close(p.w.done)
	if events, err := p.take(); err != nil || len(events) != maxBuffered {
		t.Errorf("%d events, %v", len(events), err)
	}
	for range 2 {
		if _, err := p.take(); code(asConnect(err)) != connect.CodeDataLoss {
			t.Errorf("after the events: %v", err)
		}
	}
}

func TestTreeOverflowAndNetwork(t *testing.T) {
	tr := newTree(nil, users.User{UID: uint32(os.Geteuid()), GID: uint32(os.Getegid())}, t.TempDir(), true, false)
	if err := tr.handle(-1, unix.IN_Q_OVERFLOW, "", nil); !errors.Is(err, errWatchOverflow) {
		t.Errorf("overflow: %v", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(tr.root, &st); err != nil {
		t.Fatal(err)
	}
	tr.dev[st.Dev] = false // as if it were remote
	if err := tr.start(); code(asConnect(err)) != connect.CodeInvalidArgument {
		t.Errorf("network file system: %v", err)
	}
}
