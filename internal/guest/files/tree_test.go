package files

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
)

func TestStat(t *testing.T) {
	w := newWorld(t)
	file := w.put("alice/a.txt", "Hello, World!", 0o644, aliceID)
	w.must(os.Mkdir(filepath.Join(w.home, "d"), 0o755))
	for link, text := range map[string]string{"link": "a.txt", "chain": "link", "dirlink": "d", "broken": "nowhere", "cyclic": "cyclic"} {
		w.must(os.Symlink(text, filepath.Join(w.home, link)))
	}
	w.must(unix.Mkfifo(filepath.Join(w.home, "fifo"), 0o600))
	w.put("bob/secret/x", "x", 0o600, bobID)
	w.must(os.Chmod(filepath.Join(w.dir, "bob/secret"), 0o700))
	odd := filepath.Join(w.home, "odd\xff")
	w.must(os.WriteFile(odd, nil, 0o644))

	type entry struct {
		Name, Path, Permissions, Target string
		Type                            filesystem.FileType
		Mode                            uint32
		Size                            int64
	}
	const (
		isFile = filesystem.FileType_FILE_TYPE_FILE
		isDir  = filesystem.FileType_FILE_TYPE_DIRECTORY
		isLink = filesystem.FileType_FILE_TYPE_SYMLINK
	)
	real, err := filepath.EvalSymlinks(file)
	w.must(err)
	home := w.home
	tests := []struct {
		path string
		want entry
		code connect.Code
	}{
		{"a.txt", entry{"a.txt", file, "-rw-r--r--", "", isFile, 0o644, 13}, 0},
		{file, entry{"a.txt", file, "-rw-r--r--", "", isFile, 0o644, 13}, 0},
		{"~/a.txt", entry{"a.txt", file, "-rw-r--r--", "", isFile, 0o644, 13}, 0},
		{"./d/../a.txt", entry{"a.txt", file, "-rw-r--r--", "", isFile, 0o644, 13}, 0},
		{"d", entry{"d", home + "/d", "drwxr-xr-x", "", isDir, 0o755, -1}, 0},
		{"link", entry{"link", home + "/link", "Lrwxrwxrwx", real, isFile, 0o644, 13}, 0},
		{"chain", entry{"chain", home + "/chain", "Lrwxrwxrwx", real, isFile, 0o644, 13}, 0},
		{"dirlink", entry{"dirlink", home + "/dirlink", "Lrwxrwxrwx", filepath.Dir(real) + "/d", isDir, 0o755, -1}, 0},
		{"broken", entry{"broken", home + "/broken", "Lrwxrwxrwx", "nowhere", isLink, 0o777, 7}, 0},
		{"cyclic", entry{"cyclic", home + "/cyclic", "Lrwxrwxrwx", "cyclic", isLink, 0o777, 6}, 0},
		{"fifo", entry{"fifo", home + "/fifo", "prw-------", "", filesystem.FileType_FILE_TYPE_UNSPECIFIED, 0o600, 0}, 0},
		{"odd\uFFFD", entry{}, connect.CodeNotFound},
		{"none", entry{}, connect.CodeNotFound},
		{"a.txt/below", entry{}, connect.CodeNotFound},
		{"../bob/secret/x", entry{}, connect.CodePermissionDenied},
		{"nul\x00", entry{}, connect.CodeInvalidArgument},
		{strings.Repeat("n", 256), entry{}, connect.CodeInvalidArgument},
		{strings.Repeat("n/", 2100), entry{}, connect.CodeInvalidArgument},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%.20q", tt.path), func(t *testing.T) {
			resp, err := w.client("alice").Stat(t.Context(), connect.NewRequest(&filesystem.StatRequest{Path: tt.path}))
			if code(err) != tt.code {
				t.Fatalf("code %v (%v), want %v", code(err), err, tt.code)
			}
			if err != nil {
				return
			}
			e := resp.Msg.GetEntry()
			got := entry{e.GetName(), e.GetPath(), e.GetPermissions(), e.GetSymlinkTarget(), e.GetType(), e.GetMode(), e.GetSize()}
			if tt.want.Size < 0 {
				got.Size = -1
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if (e.SymlinkTarget != nil) != (tt.want.Target != "") {
				t.Errorf("symlink_target present: %v", e.SymlinkTarget != nil)
			}
			if e.GetModifiedTime().AsTime().IsZero() || e.GetMetadata() != nil {
				t.Errorf("time %v, metadata %v", e.GetModifiedTime(), e.GetMetadata())
			}
		})
	}
	resp, err := w.client("root").Stat(t.Context(), connect.NewRequest(&filesystem.StatRequest{Path: file}))
	w.must(err)
	if e := resp.Msg.GetEntry(); e.GetOwner() != "alice" || e.GetGroup() != "alice" {
		t.Errorf("owner %s:%s, want alice:alice", e.GetOwner(), e.GetGroup())
	}
}

func TestMakeDir(t *testing.T) {
	w := newWorld(t)
	w.put("alice/file", "x", 0o644, aliceID)
	mk := func(user, p string) (*filesystem.EntryInfo, error) {
		resp, err := w.client(user).MakeDir(t.Context(), connect.NewRequest(&filesystem.MakeDirRequest{Path: p}))
		if err != nil {
			return nil, err
		}
		return resp.Msg.GetEntry(), nil
	}
	e, err := mk("alice", "a/b/c")
	w.must(err)
	if e.GetPath() != w.home+"/a/b/c" || e.GetType() != filesystem.FileType_FILE_TYPE_DIRECTORY || e.GetMode() != 0o755 {
		t.Errorf("entry %v", e)
	}
	for _, d := range []string{"a", "a/b", "a/b/c"} {
		if uid, mode := w.owner(filepath.Join(w.home, d)); uid != aliceID || mode.Perm() != 0o755 {
			t.Errorf("%s: owner %d, mode %v", d, uid, mode)
		}
	}
	for p, want := range map[string]connect.Code{
		"a":         connect.CodeAlreadyExists,
		"file":      connect.CodeInvalidArgument,
		"file/sub":  connect.CodeInvalidArgument,
		"../bob/no": connect.CodePermissionDenied,
	} {
		if _, err := mk("alice", p); code(err) != want {
			t.Errorf("%s: %v, want %v", p, err, want)
		}
	}
}

func TestMove(t *testing.T) {
	w := newWorld(t)
	mv := func(src, dst string) (*filesystem.EntryInfo, error) {
		resp, err := w.client("alice").Move(t.Context(), connect.NewRequest(&filesystem.MoveRequest{Source: src, Destination: dst}))
		if err != nil {
			return nil, err
		}
		return resp.Msg.GetEntry(), nil
	}
	w.put("alice/a", "text", 0o600, aliceID)
	w.put("alice/old", "old", 0o600, aliceID)
	w.put("bob/theirs", "x", 0o666, bobID)
	w.must(os.Symlink("new/dir/a", filepath.Join(w.home, "link")))
	e, err := mv("a", "new/dir/a")
	w.must(err)
	if e.GetPath() != w.home+"/new/dir/a" || e.GetSize() != 4 {
		t.Errorf("entry %v", e)
	}
	w.gone(w.home + "/a")
	if _, err := mv("new/dir/a", "old"); err != nil {
		t.Error(err)
	}
	if got := w.get(w.home + "/old"); got != "text" {
		t.Errorf("replaced file holds %q", got)
	}
	if _, err := mv("link", "moved"); err != nil {
		t.Error(err)
	}
	if text, err := os.Readlink(w.home + "/moved"); err != nil || text != "new/dir/a" {
		t.Errorf("moved link leads to %q, %v", text, err)
	}
	for _, tt := range []struct {
		src, dst string
		want     connect.Code
	}{
		{"none", "x", connect.CodeNotFound},
		{"old/none", "x", connect.CodeNotFound},
		{"new", "new/dir/in", connect.CodeInvalidArgument},
		{"../bob/theirs", "mine", connect.CodePermissionDenied},
		{"old", "../bob/theirs", connect.CodePermissionDenied},
		{"old", "nul\x00", connect.CodeInvalidArgument},
	} {
		if _, err := mv(tt.src, tt.dst); code(err) != tt.want {
			t.Errorf("%q to %q: %v, want %v", tt.src, tt.dst, err, tt.want)
		}
	}
}

func TestRemove(t *testing.T) {
	w := newWorld(t)
	rm := func(p string) error {
		_, err := w.client("alice").Remove(t.Context(), connect.NewRequest(&filesystem.RemoveRequest{Path: p}))
		return err
	}
	w.put("alice/d/e/f", "x", 0o600, aliceID)
	w.must(os.Chown(filepath.Join(w.home, "d"), aliceID, aliceID))
	w.must(os.Chown(filepath.Join(w.home, "d/e"), aliceID, aliceID))
	kept := w.put("bob/kept", "x", 0o666, bobID)
	w.must(os.Symlink(filepath.Dir(kept), filepath.Join(w.home, "link")))
	for p, want := range map[string]connect.Code{
		"d": 0, "link": 0, "none": 0, "none/below": 0,
		kept:      connect.CodePermissionDenied,
		"/":       connect.CodeInvalidArgument,
		"nul\x00": connect.CodeInvalidArgument,
	} {
		if err := rm(p); code(err) != want {
			t.Errorf("%q: %v, want %v", p, err, want)
		}
	}
	w.gone(filepath.Join(w.home, "d"))
	w.gone(filepath.Join(w.home, "link"))
	if got := w.get(kept); got != "x" {
		t.Errorf("file behind the removed link holds %q", got)
	}
}

func TestListDir(t *testing.T) {
	w := newWorld(t)
	for _, f := range []string{"t/file1.txt", "t/subdir1/subdir1_1/x", "t/subdir1/subdir1_2/x", "t/subdir2/y", "t/odd\xff"} {
		w.put("alice/"+f, "x", 0o644, aliceID)
	}
	w.put("alice/t/closed/hidden", "x", 0o644, bobID)
	w.must(os.Chmod(filepath.Join(w.home, "t/closed"), 0o700))
	w.must(os.Symlink("subdir1", filepath.Join(w.home, "t/zlink")))
	w.must(os.Symlink("t", filepath.Join(w.home, "tlink")))
	w.must(os.Symlink("loop", filepath.Join(w.home, "loop")))
	ls := func(p string, depth uint32) ([]string, error) {
		resp, err := w.client("alice").ListDir(t.Context(), connect.NewRequest(&filesystem.ListDirRequest{Path: p, Depth: depth}))
		if err != nil {
			return nil, err
		}
		names := []string{}
		for _, e := range resp.Msg.GetEntries() {
			names = append(names, strings.TrimPrefix(e.GetPath(), w.home+"/"))
		}
		return names, nil
	}
	one := []string{"t/closed", "t/file1.txt", "t/odd\uFFFD", "t/subdir1", "t/subdir2", "t/zlink"}
	deep := []string{"t/closed", "t/file1.txt", "t/odd\uFFFD",
		"t/subdir1", "t/subdir1/subdir1_1", "t/subdir1/subdir1_1/x", "t/subdir1/subdir1_2", "t/subdir1/subdir1_2/x",
		"t/subdir2", "t/subdir2/y", "t/zlink"}
	for _, tt := range []struct {
		path  string
		depth uint32
		want  []string
		code  connect.Code
	}{
		{"t", 0, one, 0},
		{"t", 1, one, 0},
		{"t", 3, deep, 0},
		{"t", 1<<32 - 1, deep, 0},
		{"tlink/subdir2", 1, []string{"tlink/subdir2/y"}, 0},
		{"tlink", 1, []string{"tlink/closed", "tlink/file1.txt", "tlink/odd\uFFFD", "tlink/subdir1", "tlink/subdir2", "tlink/zlink"}, 0},
		{"t/file1.txt", 1, nil, connect.CodeInvalidArgument},
		{"t/closed", 1, nil, connect.CodePermissionDenied},
		{"none", 1, nil, connect.CodeNotFound},
		{"loop", 1, nil, connect.CodeFailedPrecondition},
	} {
		got, err := ls(tt.path, tt.depth)
		if code(err) != tt.code {
			t.Errorf("%s: %v, want %v", tt.path, err, tt.code)
			continue
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s to depth %d: %s", tt.path, tt.depth, diff)
		}
	}
}

func TestListDirTooMany(t *testing.T) {
	dir := t.TempDir()
	for i := range 5 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := readNames(dir, 4); code(asConnect(err)) != connect.CodeResourceExhausted {
		t.Errorf("5 names with a limit of 4: %v", err)
	}
	if names, err := readNames(dir, 5); err != nil || len(names) != 5 {
		t.Errorf("5 names with a limit of 5: %v, %v", names, err)
	}
}
