package files

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func (w *world) compose(user string, dst any, sources ...string) reply {
	b, err := json.Marshal(map[string]any{"source_paths": sources, "destination": dst, "username": user})
	w.must(err)
	return w.do(call{"POST", "/files/compose", nil, map[string]string{"Content-Type": "application/json"}, bytes.NewReader(b)})
}

func TestCompose(t *testing.T) {
	w := newWorld(t)
	big := string(pattern(20 << 20))
	for i, text := range []string{"Hello, ", big, "!"} {
		w.put("alice/part"+string(rune('0'+i)), text, 0o600, aliceID)
	}
	r := w.compose("", "sub/whole.txt", "part0", "~/part1", w.home+"/part2")
	w.want(r, 200)
	if want := `{"name":"whole.txt","type":"file","path":"` + w.home + `/sub/whole.txt"}` + "\n"; r.text != want {
		t.Errorf("answer %s", r.text)
	}
	if got := w.get(w.home + "/sub/whole.txt"); got != "Hello, "+big+"!" {
		t.Errorf("got %d bytes", len(got))
	}
	if uid, mode := w.owner(w.home + "/sub/whole.txt"); uid != aliceID || mode != 0o644 {
		t.Errorf("owner %d, mode %v", uid, mode)
	}
	for _, p := range []string{"part0", "part1", "part2"} {
		w.gone(filepath.Join(w.home, p))
	}
	left, err := os.ReadDir(w.home + "/sub")
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}

	w.put("alice/tool", "old", 0o700, aliceID)
	w.must(os.Symlink("tool", w.home+"/link"))
	w.put("alice/new", "new", 0o600, aliceID)
	w.want(w.compose("alice", "link", "new"), 200)
	if _, mode := w.owner(w.home + "/tool"); mode != 0o700 || w.get(w.home+"/tool") != "new" {
		t.Errorf("mode %v, content %q", mode, w.get(w.home+"/tool"))
	}
}

func TestComposeErrors(t *testing.T) {
	w := newWorld(t)
	w.put("alice/a", "A", 0o600, aliceID)
	w.put("alice/dst", "original", 0o600, aliceID)
	w.put("bob/b", "B", 0o600, bobID)
	w.must(os.Mkdir(w.home+"/d", 0o755))
	w.must(unix.Mkfifo(w.home+"/fifo", 0o666))
	w.must(os.Symlink("dst", w.home+"/alias"))
	for _, tt := range []struct {
		name    string
		user    string
		dst     string
		sources []string
		status  int
	}{
		{"no sources", "", "dst", nil, 400},
		{"no destination", "", "", []string{"a"}, 400},
		{"source is destination", "", "dst", []string{"dst"}, 400},
		{"source is destination by a link", "", "dst", []string{"alias"}, 400},
		{"source twice", "", "dst", []string{"a", "./a"}, 400},
		{"source is a directory", "", "dst", []string{"a", "d"}, 400},
		{"source is a fifo", "", "dst", []string{"a", "fifo"}, 400},
		{"destination is a directory", "", "d", []string{"a"}, 400},
		{"source missing", "", "dst", []string{"a", "none"}, 404},
		{"source forbidden", "", "dst", []string{"a", "../bob/b"}, 403},
		{"destination forbidden", "", "../bob/new", []string{"a"}, 403},
		{"user unknown", "eve", "dst", []string{"a"}, 401},
		{"NUL", "", "d\x00", []string{"a"}, 400},
	} {
		t.Run(tt.name, func(t *testing.T) { w.at(t).want(w.compose(tt.user, tt.dst, tt.sources...), tt.status) })
	}
	w.want(w.do(call{"POST", "/files/compose", nil, nil, strings.NewReader("{")}), 400)
	if w.get(w.home+"/a") != "A" || w.get(w.home+"/dst") != "original" {
		t.Error("something was changed")
	}
	names, err := readNames(w.home, 100)
	w.must(err)
	for _, n := range names {
		if strings.HasPrefix(n, ".agentiso-") {
			t.Errorf("%s was left behind", n)
		}
	}
}
