package state

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentiso/agentiso/internal/domain"
)

// crashEnv tells a re-executed test binary which file to write to.
const crashEnv = "AGENTISO_TEST_STATE_CRASH"

func TestMain(m *testing.M) {
	if path := os.Getenv(crashEnv); path != "" {
		writeForEver(path)
	}
	os.Exit(m.Run())
}

// writeForEver inserts and updates, saying each write when it has returned.
func writeForEver(path string) {
	ctx := context.Background()
	db, err := Open(ctx, Options{Path: path})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		w := ws(fmt.Sprintf("%d-%d", os.Getpid(), i), fmt.Sprintf("n%d-%d", os.Getpid(), i))
		for _, st := range []domain.State{domain.Creating, domain.Running} {
			w.State = st
			if st == domain.Creating {
				err = db.Insert(ctx, w, 1<<30)
			} else {
				err = db.Update(ctx, w)
			}
			if err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
			fmt.Println(w.ID, w.State)
		}
	}
}

// TestKilledWriter kills a process amid its writes, several times over the
// same file, and finds every write that it had been told was done.
func TestKilledWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	said := map[string]string{}
	for round := range 4 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), crashEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		n := 0
		for lines.Scan() {
			id, st, _ := strings.Cut(lines.Text(), " ")
			if id == "error" {
				t.Errorf("child: %s", st)
			}
			said[id] = st
			if n++; n == 15+7*round {
				_ = cmd.Process.Kill() // what it says until it is dead counts as well
			}
		}
		_ = cmd.Wait()
		db := open(t, path)
		all, err := db.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		have := map[string]string{}
		for _, w := range all {
			have[w.ID] = string(w.State)
		}
		for id, st := range said {
			if h := have[id]; h != st && (st != string(domain.Creating) || h != string(domain.Running)) {
				t.Errorf("round %d: %s was acknowledged as %s and is %q", round, id, st, h)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
