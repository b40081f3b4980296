package files

import (
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// entryAt describes what is at the path p. Call it as the user.
//
// A symbolic link is described as clients know it: name, path, permissions
// string and owner are the link's; type, size, mode and time are those of what
// it leads to, whose resolved path is the symlink_target. A link that leads
// nowhere has the type symlink and its text as the target.
func entryAt(p string, names *users.Names) (*filesystem.EntryInfo, error) {
	fi, err := os.Lstat(p)
	if err != nil {
		return nil, err
	}
	return entryOf(p, fi, names), nil
}

func entryOf(p string, fi fs.FileInfo, names *users.Names) *filesystem.EntryInfo {
	e := &filesystem.EntryInfo{
		Name: valid(path.Base(p)),
		Path: valid(p),
		// Go's form of the mode: "-rw-r--r--", "drwxr-xr-x", "Lrwxrwxrwx".
		Permissions: fi.Mode().String(),
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		e.Owner, e.Group = valid(names.User(st.Uid)), valid(names.Group(st.Gid))
	}
	shown := fi
	if fi.Mode()&fs.ModeSymlink != 0 {
		target, err := filepath.EvalSymlinks(p)
		if err == nil {
			shown, err = os.Stat(p)
		}
		if err != nil {
			shown = fi
			target, _ = os.Readlink(p)
		}
		target = valid(target)
		e.SymlinkTarget = &target
	}
	e.Type = typeOf(shown.Mode())
	e.Size = shown.Size()
	e.Mode = uint32(shown.Mode().Perm())
	e.ModifiedTime = timestamppb.New(shown.ModTime())
	// user.* attributes exist on files and directories only.
	if e.Type == filesystem.FileType_FILE_TYPE_FILE || e.Type == filesystem.FileType_FILE_TYPE_DIRECTORY {
		e.Metadata = attrsAt(p).read()
	}
	return e
}

func typeOf(m fs.FileMode) filesystem.FileType {
	switch {
	case m.IsRegular():
		return filesystem.FileType_FILE_TYPE_FILE
	case m.IsDir():
		return filesystem.FileType_FILE_TYPE_DIRECTORY
	case m&fs.ModeSymlink != 0:
		return filesystem.FileType_FILE_TYPE_SYMLINK
	}
	return filesystem.FileType_FILE_TYPE_UNSPECIFIED
}

// kind names a special file for an error.
func kind(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "a directory"
	case m&fs.ModeNamedPipe != 0:
		return "a FIFO"
	case m&fs.ModeSocket != 0:
		return "a socket"
	case m&fs.ModeDevice != 0:
		return "a device"
	}
	return "not a regular file"
}
